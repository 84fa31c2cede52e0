"""Header, directory, and the bytes of the head: the first stages of the checks (spec, "Order of checks").

After `read_head` every section lies where it should, and every byte of the head matches its digest.
Nothing is known yet about what the sections say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import xxhash

from . import layout as L
from .faults import Findings

ReadAt = Callable[[int, int], bytes]  # (offset, size) -> bytes, fewer only at the end of the file
_U64 = 1 << 64


@dataclass
class Head:
    """The verified head of a file."""

    file_size: int = 0
    file_id: str = ""
    content_flags: int = 0
    optional_features: int = 0
    record_alignment: int = 0
    head_size: int = 0
    sections: tuple[L.Section, ...] = ()
    by_type: dict[bytes, L.Section] = field(default_factory=dict)
    contents: dict[bytes, bytes] = field(default_factory=dict)

    def section(self, kind: bytes) -> bytes:
        """The bytes of one head section. Delete them from `contents` when they are understood: they may be many."""
        return self.contents[kind]


def read_head(read_at: ReadAt, size: int, findings: Findings) -> Head:
    """Check header, directory and head of a file of `size` bytes; raises Stop after the first bad stage."""
    head = Head()
    raw = _signature(read_at, size, findings)
    count, directory_digest = _header(raw, size, head, findings)
    directory_end = L.HEADER_SIZE + count * L.DIRECTORY_ENTRY_SIZE
    directory = read_at(L.HEADER_SIZE, directory_end - L.HEADER_SIZE)
    if xxhash.xxh64_intdigest(directory) != directory_digest:
        findings.end("directory-digest", 56, "the directory does not match its digest")
    _entries(directory, head, findings)
    _placement(directory_end, head, findings)
    _contents(read_at, raw + directory, head, findings)
    return head


def _signature(read_at: ReadAt, size: int, findings: Findings) -> bytes:
    """The header's bytes, known to be a header of this major version."""
    raw = read_at(0, min(size, L.HEADER_SIZE))
    if not raw:
        findings.end("file-empty", 0, "the file is empty")
    if raw[:4] != L.MAGIC[: len(raw[:4])]:
        findings.end("bad-magic", 0, "not a .squizd file")
    if len(raw) < L.HEADER_SIZE:
        findings.end("file-short", len(raw), f"{len(raw)} bytes are less than a header")
    if raw[:8] != L.MAGIC:
        findings.end("text-mode-damage", 4, "the file was transferred in text mode")
    h = np.frombuffer(raw, L.HEADER)[0]
    major = int(h["major"])
    if major == 0:
        findings.end("version-zero", 8, "major version 0")
    if major == L.MAJOR << 8:
        findings.end("version-byte-swapped", 8, "the version is big-endian")
    if major != L.MAJOR:
        findings.end("version-future", 8, f"format version {major}; this reader knows {L.MAJOR}")
    if xxhash.xxh64_intdigest(raw[:248]) != int(h["header_digest"]):
        findings.end("header-digest", 248, "the header does not match its digest")
    return raw


def _header(raw: bytes, size: int, head: Head, findings: Findings) -> tuple[int, int]:
    """Check the header's fields; returns the number of sections and the directory's digest."""
    h = {name: int(np.frombuffer(raw, L.HEADER)[0][name]) for name in L.HEADER_NUMBERS}
    head.file_size, head.head_size = h["file_size"], h["head_size"]
    head.content_flags, head.optional_features = h["content_flags"], h["optional_features"]
    alignment = head.record_alignment = h["record_alignment"]

    def require(fine: bool, code: str, offset: int, message: str) -> None:
        if not fine:
            findings.add(code, offset, message)

    require(h["header_size"] == L.HEADER_SIZE, "header-size", 12, f"header_size {h['header_size']}")
    features = h["required_features"]
    require(features == 0, "unknown-required-feature", 16, f"required_features {features:#x}")
    require(size >= head.file_size, "file-truncated", 32, f"{size} of {head.file_size} bytes")
    require(size <= head.file_size, "trailing-bytes", head.file_size, f"{size - head.file_size} bytes after the end")
    at = h["directory_offset"]
    require(at == L.HEADER_SIZE, "directory-offset", 40, f"directory_offset {at}")
    count, entry_size = h["directory_count"], h["directory_entry_size"]
    require(1 <= count <= L.MAX_SECTIONS, "section-count", 48, f"{count} sections")
    require(entry_size == L.DIRECTORY_ENTRY_SIZE, "directory-entry-size", 52, f"directory_entry_size {entry_size}")
    require(
        L.PART_ALIGNMENT <= alignment <= L.MAX_RECORD_ALIGNMENT and alignment & (alignment - 1) == 0,
        "record-alignment",
        68,
        f"record_alignment {alignment}",
    )
    require(head.head_size <= min(L.MAX_HEAD_SIZE, head.file_size), "head-limit", 72, f"head_size {head.head_size}")
    end = L.HEADER_SIZE + count * L.DIRECTORY_ENTRY_SIZE
    require(end <= head.head_size, "directory-range", 48, f"the directory ends at {end}, the head at {head.head_size}")
    require(not any(raw[80:248]), "header-reserved", 80, "reserved header bytes are not zero")
    findings.close_stage()
    return count, h["directory_digest"]


def _entries(directory: bytes, head: Head, findings: Findings) -> None:
    sections = []
    for i, row in enumerate(np.frombuffer(directory, L.SECTION).tolist()):
        at = L.HEADER_SIZE + i * L.DIRECTORY_ENTRY_SIZE
        kind, flags, offset, stored_size, raw_size, codec, reserved0, digest, reserved1 = row
        s = L.Section(kind, bool(flags & L.SECTION_CRITICAL), offset, stored_size, raw_size, codec, digest)
        prescribed = kind in L.CRITICAL_SECTIONS
        ancillary = not prescribed
        bad: list[tuple[str, int, str]] = []
        if not (kind.isalnum() and kind.isascii()):
            bad.append(("section-type", 0, "not a type"))
        if flags & ~L.SECTION_CRITICAL:
            bad.append(("section-flags", 4, f"flags {flags:#x}"))
        if prescribed != s.critical and (prescribed or kind in L.APPENDICES):
            bad.append(("section-critical-flag", 4, f"critical bit {int(s.critical)}"))
        elif s.critical and not prescribed:
            bad.append(("section-unknown-critical", 0, "critical and unknown"))
        if not stored_size or not raw_size:
            bad.append(("section-empty", 16, f"{stored_size} bytes, decoded {raw_size}"))
        if codec not in (L.CODECS if ancillary else (L.RAW,)):
            bad.append(("section-codec", 32, f"codec {codec}"))
        if max(stored_size, raw_size) > _limit(kind):
            bad.append(("section-limit", 16, f"{stored_size} bytes, decoded {raw_size}"))
        if codec == L.RAW and stored_size != raw_size:
            bad.append(("section-size", 24, f"{stored_size} stored, {raw_size} raw"))
        if codec == L.ZSTD and raw_size > stored_size * L.MAX_ZSTD_RATIO:
            bad.append(("section-ratio", 24, f"{stored_size} bytes decode to {raw_size}"))
        if any(reserved0) or any(reserved1):
            bad.append(("section-reserved", 34, "reserved bytes are not zero"))
        if kind in L.DATA_SECTIONS and digest:
            bad.append(("data-section-digest", 40, "the digest field is not zero"))
        if kind in head.by_type:
            bad.append(("section-duplicate", 0, "occurs twice"))
        for code, shift, message in bad:
            findings.add(code, at + shift, f"section {s.label}: {message}")
        head.by_type[kind] = s
        sections.append(s)
    head.sections = tuple(sections)
    findings.close_stage()


def _limit(kind: bytes) -> int:
    """The most bytes that a section of this type may have; indexes have limits of their own."""
    if kind in (L.META, L.STRS):
        return L.MAX_JSON_SIZE if kind == L.META else L.MAX_NAMES_SIZE
    return _U64 if kind in L.CRITICAL_SECTIONS else L.MAX_RECORD_SIZE


def _placement(directory_end: int, head: Head, findings: Findings) -> None:
    for kind in L.REQUIRED_SECTIONS:
        if kind not in head.by_type:
            findings.add("section-missing", L.HEADER_SIZE, f"section {kind.decode()} is missing")
    for group in (L.MOE_SECTIONS, L.FILE_SECTIONS):
        have = [kind for kind in group if kind in head.by_type]
        if have and len(have) != len(group):
            lacking = b" ".join(kind for kind in group if kind not in have).decode()
            findings.add("section-incomplete-set", L.HEADER_SIZE, f"{have[0].decode()} without {lacking}")
    order = {kind: i for i, kind in enumerate(L.CRITICAL_SECTIONS)}
    end, last, head_end = directory_end, -1, 0
    for i, s in enumerate(head.sections):
        at, label = L.HEADER_SIZE + i * L.DIRECTORY_ENTRY_SIZE, f"section {s.label}"
        rank = order.get(s.type, len(order))
        if rank < last:
            findings.add("section-order", at, f"{label} is out of order")
        last = max(rank, last)
        if s.offset + s.stored_size >= _U64:
            findings.end("section-wraps", at + 8, f"{label}: offset plus size wraps")
        alignment = head.record_alignment if s.type == L.SHRD else L.PART_ALIGNMENT
        expected = L.align(end, alignment)
        if s.offset < directory_end:
            findings.add("section-over-header", at + 8, f"{label} at {s.offset} lies over the header or directory")
        elif s.offset < end:
            findings.add("section-overlap", at + 8, f"{label} at {s.offset} overlaps the one before")
        elif s.offset % alignment:
            findings.add("section-unaligned", at + 8, f"{label} at {s.offset}, no multiple of {alignment}")
        elif s.offset != expected:
            findings.add("section-gap", at + 8, f"{label} at {s.offset}, not {expected}")
        end = s.offset + s.stored_size
        if end > head.file_size:
            findings.add("section-range", at + 16, f"{label} ends at {end}, past the end of the file")
        if s.type in L.HEAD_SECTIONS:
            head_end = end
    if end < head.file_size:
        findings.add("section-gap", end, f"{head.file_size - end} bytes belong to no section")
    if head_end != head.head_size:
        findings.add("head-size", 72, f"head_size {head.head_size}, the head ends at {head_end}")
    findings.close_stage()


def _contents(read_at: ReadAt, start: bytes, head: Head, findings: Findings) -> None:
    """Read the sections of the head one by one; `start` is what lies before them."""
    identity, end = hashlib.sha256(start), len(start)
    for i, s in enumerate(head.sections):
        if s.type not in L.HEAD_SECTIONS:
            continue
        padding, content = read_at(end, s.offset - end), read_at(s.offset, s.stored_size)
        if len(padding) + len(content) < s.offset + s.stored_size - end:
            findings.end("file-truncated", end, "the file changed while it was read")
        if any(padding):
            findings.add("padding-nonzero", end, f"padding before section {s.label} is not zero")
        end = s.offset + s.stored_size
        if xxhash.xxh64_intdigest(content) != s.digest:
            at = L.HEADER_SIZE + i * L.DIRECTORY_ENTRY_SIZE + 40
            findings.add("section-digest", at, f"section {s.label} does not match its digest")
        identity.update(padding)
        identity.update(content)
        head.contents[s.type] = content
    head.file_id = identity.hexdigest()
    findings.close_stage()
