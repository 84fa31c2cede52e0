"""From bytes to a checked table of contents: every structural rule of the spec.

`parse` reads the header and the head (directory, metadata, indexes), never the payload, and collects
every fault it can see; reader and validator both stand on it, so they cannot disagree. Long because
it is the whole list of rules in the order of the spec, with nothing beside them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from . import layout as L
from . import metadata as meta
from .faults import Fault

ReadAt = Callable[[int, int], bytes]  # (offset, size) -> bytes, possibly short
_FILE_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


@dataclass
class Contents:
    """What a file holds, as far as its head tells."""

    file_size: int = 0
    file_id: str = ""
    content_flags: int = 0
    optional_features: int = 0
    record_alignment: int = 0
    head_size: int = 0
    sections: tuple[L.Section, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    files: dict[str, L.Record] = field(default_factory=dict)
    residents: dict[str, tuple[L.Tensor, L.Record]] = field(default_factory=dict)
    layouts: tuple[L.Layout, ...] = ()
    moe_layers: tuple[L.MoeLayer, ...] = ()
    experts: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(0, L.EXPERT))


class _Stop(Exception):
    """The rest cannot be read with any sense."""


def parse(read_at: ReadAt, size: int) -> tuple[Contents, list[Fault]]:
    """Check a file of `size` bytes; returns what could be understood and every fault found."""
    parser = _Parser(read_at, size)
    try:
        parser.run()
    except _Stop:
        pass
    return parser.contents, parser.faults


class _Parser:
    def __init__(self, read_at: ReadAt, size: int) -> None:
        self.read_at, self.size = read_at, size
        self.contents, self.faults = Contents(), list[Fault]()
        self.by_type: dict[bytes, L.Section] = {}
        self.names = b""
        self.flags = 0

    def fault(self, code: str, offset: int, message: str) -> None:
        self.faults.append(Fault(code, offset, message))

    def stop(self, code: str, offset: int, message: str) -> None:
        self.fault(code, offset, message)
        raise _Stop

    def run(self) -> None:
        self.header()
        self.directory()
        head = self.read_at(0, self.contents.head_size)
        if len(head) < self.contents.head_size:
            self.stop("file-truncated", len(head), "the file became shorter while it was read")
        self.contents.file_id = hashlib.sha256(head).hexdigest()
        self.head = memoryview(head)
        self.head_digests()
        self.names = bytes(self.section(L.STRS))
        self.meta()
        self.residents()
        self.files()
        if L.EXPI in self.by_type:
            self.layouts()
            self.moe_layers()
            self.experts()
        for kind, flag in L.SECTION_FLAGS.items():
            self.flags |= flag if kind in self.by_type else 0
        if self.flags != self.contents.content_flags and not self.faults:
            self.fault("content-flags", 64, f"content_flags {self.contents.content_flags:#x}, implied {self.flags:#x}")

    # -- header ------------------------------------------------------------------------------------

    def header(self) -> None:
        if self.size == 0:
            self.stop("file-empty", 0, "the file is empty")
        if self.size < L.HEADER_SIZE:
            start = self.read_at(0, 4)
            if start != L.MAGIC[: len(start)]:
                self.stop("bad-magic", 0, "not a .squizd file")
            self.stop("file-short", self.size, f"{self.size} bytes are less than a header")
        raw = self.read_at(0, L.HEADER_SIZE)
        if len(raw) < L.HEADER_SIZE:
            self.stop("file-short", len(raw), "the header cannot be read whole")
        h = np.frombuffer(raw, L.HEADER)[0]
        if raw[:4] != L.MAGIC[:4]:
            self.stop("bad-magic", 0, "not a .squizd file")
        if raw[:8] != L.MAGIC:
            self.stop("text-mode-damage", 4, "the file was transferred in text mode")
        major = int(h["major"])
        if major == 0:
            self.stop("version-zero", 8, "major version 0")
        if major & 0xFF == 0 and major >> 8 == L.MAJOR:
            self.stop("version-byte-swapped", 8, "the version is big-endian")
        if major != L.MAJOR:
            self.stop("version-future", 8, f"format version {major}; this reader knows {L.MAJOR}")
        if xxhash.xxh64_intdigest(raw[:248]) != int(h["header_digest"]):
            self.stop("header-digest", 248, "the header does not match its digest")
        if int(h["required_features"]):
            self.stop("unknown-required-feature", 16, f"required features {int(h['required_features']):#x}")
        if int(h["header_size"]) != L.HEADER_SIZE:
            self.stop("header-size", 12, f"header_size {int(h['header_size'])}")
        if any(raw[80:248]):
            self.fault("header-reserved", 80, "reserved header bytes are not zero")
        c = self.contents
        c.file_size, c.content_flags = int(h["file_size"]), int(h["content_flags"])
        c.record_alignment, c.head_size = int(h["record_alignment"]), int(h["head_size"])
        c.optional_features = int(h["optional_features"])
        self.count, self.directory_digest = int(h["directory_count"]), int(h["directory_digest"])
        if c.file_size > self.size:
            self.fault("file-truncated", 32, f"{self.size} bytes of {c.file_size}")
        elif c.file_size < self.size:
            self.fault("trailing-bytes", c.file_size, f"{self.size - c.file_size} bytes after the end")
        if not (L.PART_ALIGNMENT <= c.record_alignment <= L.MAX_RECORD_ALIGNMENT) or (
            c.record_alignment & (c.record_alignment - 1)
        ):
            self.stop("record-alignment", 68, f"record_alignment {c.record_alignment}")
        if int(h["directory_offset"]) != L.HEADER_SIZE:
            self.stop("directory-offset", 40, f"directory_offset {int(h['directory_offset'])}")
        if int(h["directory_entry_size"]) != L.DIRECTORY_ENTRY_SIZE:
            self.stop("directory-entry-size", 52, f"directory_entry_size {int(h['directory_entry_size'])}")
        if not 1 <= self.count <= L.MAX_SECTIONS:
            self.stop("section-count", 48, f"{self.count} sections")
        if c.head_size > L.MAX_HEAD_SIZE or c.head_size > c.file_size:
            self.stop("head-size", 72, f"head_size {c.head_size}")
        if c.head_size > self.size:
            self.stop("file-truncated", 32, "the file ends before its indexes do")

    # -- directory ---------------------------------------------------------------------------------

    def directory(self) -> None:
        end = L.HEADER_SIZE + self.count * L.DIRECTORY_ENTRY_SIZE
        if end > self.contents.head_size:
            self.stop("directory-range", 48, f"the directory ends at {end}, after the head")
        raw = self.read_at(L.HEADER_SIZE, end - L.HEADER_SIZE)
        if xxhash.xxh64_intdigest(raw) != self.directory_digest:
            self.stop("directory-digest", 56, "the directory does not match its digest")
        sections = []
        for i, e in enumerate(np.frombuffer(raw, L.SECTION)):
            sections.append(self.directory_entry(e, L.HEADER_SIZE + i * L.DIRECTORY_ENTRY_SIZE))
        self.contents.sections = tuple(sections)
        for kind in L.REQUIRED_SECTIONS:
            if kind not in self.by_type:
                self.fault("section-missing", L.HEADER_SIZE, f"section {kind.decode()} is missing")
        for group in (L.MOE_SECTIONS, L.FILE_SECTIONS):
            have = [kind for kind in group if kind in self.by_type]
            if have and len(have) != len(group):
                lacking = b" ".join(kind for kind in group if kind not in have).decode()
                self.fault("section-incomplete-set", L.HEADER_SIZE, f"{have[0].decode()} without {lacking}")
        self.place_sections(end)
        if self.faults:
            raise _Stop

    def directory_entry(self, e: Any, at: int) -> L.Section:
        kind = bytes(e["type"])
        label = kind.decode("ascii", "replace")
        if not (kind.isalnum() and kind.isascii()):
            self.fault("section-type", at, f"section type {kind!r}")
        flags = int(e["flags"])
        critical = bool(flags & L.SECTION_CRITICAL)
        if flags & ~L.SECTION_CRITICAL:
            self.fault("section-flags", at + 4, f"section {label}: flags {flags:#x}")
        known = kind in L.HEAD_SECTIONS or kind in L.DATA_SECTIONS
        if known != critical and (known or kind in L.APPENDICES):
            self.fault("section-critical-flag", at + 4, f"section {label}: critical bit is {int(critical)}")
        elif critical and not known:
            self.fault("section-unknown-critical", at, f"section {label} is critical and unknown")
        if any(bytes(e["reserved0"])) or any(bytes(e["reserved1"])):
            self.fault("section-reserved", at + 34, f"section {label}: reserved bytes are not zero")
        section = L.Section(
            kind,
            critical,
            int(e["offset"]),
            int(e["stored_size"]),
            int(e["raw_size"]),
            int(e["codec"]),
            int(e["digest"]),
        )
        codec_allowed = L.CODECS if kind not in L.HEAD_SECTIONS + L.DATA_SECTIONS else (L.RAW,)
        if section.codec not in codec_allowed:
            self.fault("section-codec", at + 32, f"section {label}: codec {section.codec}")
        elif section.codec == L.RAW and section.stored_size != section.raw_size:
            self.fault(
                "section-size", at + 24, f"section {label}: {section.stored_size} stored, {section.raw_size} raw"
            )
        if section.stored_size == 0 or section.raw_size == 0:
            self.fault("section-empty", at + 16, f"section {label} is empty")
        if section.raw_size > L.MAX_RECORD_SIZE and kind not in L.DATA_SECTIONS:
            self.fault("section-size", at + 24, f"section {label}: {section.raw_size} bytes")
        if kind in L.DATA_SECTIONS and section.digest:
            self.fault("data-section-digest", at + 40, f"section {label}: digest field is not zero")
        if kind in self.by_type:
            self.fault("section-duplicate", at, f"section {label} occurs twice")
        self.by_type[kind] = section
        return section

    def place_sections(self, end: int) -> None:
        order = {kind: i for i, kind in enumerate(L.HEAD_SECTIONS + L.DATA_SECTIONS)}
        last, head_end = -1, 0
        for i, s in enumerate(self.contents.sections):
            at, label = L.HEADER_SIZE + i * L.DIRECTORY_ENTRY_SIZE, s.type.decode("ascii", "replace")
            rank = order.get(s.type, len(order))
            if rank < last:
                self.fault("section-order", at, f"section {label} is out of order")
            last = max(rank, last)
            alignment = self.contents.record_alignment if s.type == L.SHRD else L.PART_ALIGNMENT
            expected = L.align(end, alignment)
            if s.offset + s.stored_size >= 1 << 64:
                self.stop("section-wraps", at + 8, f"section {label}: offset plus size wraps")
            if s.offset < L.HEADER_SIZE + self.count * L.DIRECTORY_ENTRY_SIZE:
                self.fault("section-over-header", at + 8, f"section {label} at {s.offset} lies over the header")
            elif s.offset < end:
                self.fault("section-overlap", at + 8, f"section {label} at {s.offset} overlaps the one before")
            elif s.offset % alignment:
                self.fault(
                    "section-unaligned", at + 8, f"section {label} at {s.offset} is not a multiple of {alignment}"
                )
            elif s.offset != expected:
                self.fault("section-gap", at + 8, f"section {label} at {s.offset}, expected {expected}")
            end = s.offset + s.stored_size
            if end > self.contents.file_size:
                self.fault("section-range", at + 16, f"section {label} ends at {end}, past the end of the file")
            if s.type in L.HEAD_SECTIONS:
                head_end = end
        if head_end != self.contents.head_size:
            self.fault("head-size", 72, f"head_size {self.contents.head_size}, the head ends at {head_end}")
        if end < self.contents.file_size:
            self.fault("section-gap", end, f"{self.contents.file_size - end} bytes belong to no section")

    def head_digests(self) -> None:
        end = L.HEADER_SIZE + self.count * L.DIRECTORY_ENTRY_SIZE
        for i, s in enumerate(self.contents.sections):
            if s.type not in L.HEAD_SECTIONS:
                continue
            if any(self.head[end : s.offset]):
                self.fault("padding-nonzero", end, f"padding before section {s.type.decode()} is not zero")
            end = s.offset + s.stored_size
            if xxhash.xxh64_intdigest(self.head[s.offset : end]) != s.digest:
                at = L.HEADER_SIZE + i * L.DIRECTORY_ENTRY_SIZE + 40
                self.fault("section-digest", at, f"section {s.type.decode()} does not match its digest")
        if self.faults:
            raise _Stop

    def section(self, kind: bytes) -> memoryview:
        s = self.by_type[kind]
        return self.head[s.offset : s.offset + s.stored_size]

    def index(self, kind: bytes, entry: np.dtype[Any], limit: int) -> np.ndarray[Any, Any]:
        data, at = self.section(kind), self.by_type[kind].offset
        if len(data) % entry.itemsize:
            self.stop("index-size", at, f"{kind.decode()}: {len(data)} bytes are not entries of {entry.itemsize}")
        if len(data) // entry.itemsize > limit:
            self.stop("index-count", at, f"{kind.decode()}: {len(data) // entry.itemsize} entries")
        return np.frombuffer(data, entry)

    # -- names and metadata ------------------------------------------------------------------------

    def meta(self) -> None:
        s = self.by_type[L.META]
        try:
            self.contents.metadata = meta.decode(bytes(self.section(L.META)))
        except meta.MetadataError as error:
            self.fault(error.code, s.offset, str(error))

    def name(self, offset: int, length: int, at: int) -> str:
        if not 1 <= length <= L.MAX_NAME_LENGTH:
            self.fault("name-length", at + 4, f"a name of {length} bytes")
            return ""
        if offset + length > len(self.names):
            self.fault("name-range", at, f"name at {offset} of {length} bytes, STRS has {len(self.names)}")
            return ""
        raw = self.names[offset : offset + length]
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fault("name-utf8", at, f"name {raw[:40]!r} is not UTF-8")
            return ""
        if any(c < " " or "\x7f" <= c <= "\x9f" for c in name):
            self.fault("name-control", at, f"name {name[:40]!r} has a control character")
        return name

    def unique(self, name: str, seen: Iterable[str], at: int) -> None:
        if name and name in seen:
            self.fault("name-duplicate", at, f"name {name} occurs twice")

    # -- tensors and records -----------------------------------------------------------------------

    def tensor(self, e: Any, at: int, start: int, in_layout: bool) -> tuple[L.Tensor | None, int]:
        """Check one tensor entry whose parts must start at `start`; returns it and where they end."""
        name = self.name(int(e["name_offset"]), int(e["name_length"]), at)
        label, before = name or f"entry at {at}", len(self.faults)
        ndim, dims = int(e["ndim"]), [int(d) for d in e["shape"]]
        if not 1 <= ndim <= L.MAX_DIMENSIONS:
            self.fault("tensor-dims", at + 11, f"{label}: {ndim} dimensions")
            return None, start
        shape = tuple(dims[:ndim])
        if any(dims[ndim:]):
            self.fault("tensor-unused-dim", at + 16, f"{label}: shape {dims} with {ndim} dimensions")
        if 0 in shape:
            self.fault("tensor-zero-dim", at + 16, f"{label}: shape {list(shape)}")
        elements = 1
        for d in shape:
            elements *= d
        if elements > L.MAX_ELEMENTS:
            self.fault("tensor-overflow", at + 16, f"{label}: shape {list(shape)}")
        dtype, mode, role = L.DTYPES.get(int(e["dtype"])), L.MODES.get(int(e["mode"])), L.ROLES.get(int(e["role"]))
        if dtype is None:
            self.fault("tensor-dtype", at + 9, f"{label}: dtype {int(e['dtype'])}")
        if mode is None:
            self.fault("tensor-mode", at + 8, f"{label}: mode {int(e['mode'])}")
        if role is None or (role == "expert") != in_layout:
            self.fault("tensor-role", at + 6, f"{label}: role {role or int(e['role'])}")
        if dtype is None or mode is None or role is None or len(self.faults) > before:
            return None, start
        encoding = L.Encoding(mode, dtype, int(e["bits"]), int(e["group_size"]))
        if not encoding.is_registered():
            self.fault("tensor-encoding", at + 8, f"{label}: {encoding} is not registered")
            return None, start
        if encoding.group_size and shape[-1] % encoding.group_size:
            self.fault("row-not-divisible", at + 16, f"{label}: rows of {shape[-1]}, groups of {encoding.group_size}")
            return None, start
        expected, end = L.place(name, role, encoding, shape, start)
        found = [(int(e[f"{p}_offset"]), int(e[f"{p}_size"])) for p in ("codes", "scales", "biases")]
        wanted = (expected.codes, expected.scales, expected.biases)
        for i, part in enumerate(("codes", "scales", "biases")):
            if found[i][1] != wanted[i][1]:
                self.fault("part-size", at + 56 + 16 * i, f"{label}: {part} of {found[i][1]} bytes, not {wanted[i][1]}")
            elif found[i][0] + found[i][1] > L.MAX_RECORD_SIZE:
                self.fault("part-range", at + 48 + 16 * i, f"{label}: {part} at {found[i][0]} leave the record")
            elif found[i][0] != wanted[i][0]:
                self.fault("part-offset", at + 48 + 16 * i, f"{label}: {part} at {found[i][0]}, not {wanted[i][0]}")
        self.flags |= encoding.content_flag()
        return expected, end

    def record(self, e: Any, at: int, label: str) -> L.Record:
        r = L.Record(
            int(e["offset"]),
            int(e["stored_size"]),
            int(e["raw_size"]),
            int(e["codec"]),
            int(e["digest"]),
            int(e["layout"]),
        )
        if r.codec not in L.CODECS:
            self.fault("record-codec", at + 24, f"{label}: codec {r.codec}")
        if r.stored_size > L.MAX_RECORD_SIZE or r.raw_size > L.MAX_RECORD_SIZE:
            self.fault("record-limit", at + 8, f"{label}: {r.stored_size} bytes stored, {r.raw_size} decoded")
        elif r.stored_size == 0:
            self.fault("record-empty", at + 8, f"{label}: no bytes")
        elif r.codec == L.RAW and r.stored_size != r.raw_size:
            self.fault("record-size", at + 8, f"{label}: {r.stored_size} stored, {r.raw_size} raw")
        if any(bytes(e["reserved"])):
            self.fault("index-reserved", at + 28, f"{label}: reserved bytes are not zero")
        return r

    def resident_record(self, e: Any, at: int, label: str, end: int) -> tuple[L.Record, int]:
        record = self.record(e, at, label)
        if record.layout:
            self.fault("record-layout", at + 26, f"{label}: layout {record.layout}")
        if record.offset != end:
            self.fault("record-offset", at, f"{label}: at {record.offset}, expected {end}")
        return record, record.offset + min(record.stored_size, L.MAX_RECORD_SIZE)

    def fills(self, kind: bytes, end: int) -> None:
        s = self.by_type[kind]
        if end != s.offset + s.stored_size:
            self.fault("record-range", s.offset, f"records end at {end}, {kind.decode()} at {s.offset + s.stored_size}")

    def residents(self) -> None:
        entries, base = self.index(L.TENS, L.RESIDENT, L.MAX_TENSORS), self.by_type[L.TENS].offset
        end = self.by_type[L.RESD].offset
        found = self.contents.residents
        for i, e in enumerate(entries):
            at = base + i * L.RESIDENT.itemsize
            tensor, raw_size = self.tensor(e["tensor"], at, 0, in_layout=False)
            label = tensor.name if tensor else f"tensor {i}"
            record, end = self.resident_record(
                e["record"], at + L.TENSOR.itemsize, label, L.align(end, L.PART_ALIGNMENT)
            )
            if tensor is None:
                continue
            if record.raw_size != raw_size:
                self.fault(
                    "record-raw-size",
                    at + L.TENSOR.itemsize + 16,
                    f"{label}: {record.raw_size}, parts end at {raw_size}",
                )
            self.unique(tensor.name, found, at)
            found[tensor.name] = (tensor, record)
        self.fills(L.RESD, end)

    def files(self) -> None:
        if L.FILE not in self.by_type:
            return
        entries, base = self.index(L.FILE, L.EMBEDDED, L.MAX_FILES), self.by_type[L.FILE].offset
        end = self.by_type[L.BNDL].offset
        for i, e in enumerate(entries):
            at = base + i * L.EMBEDDED.itemsize
            name = self.name(int(e["name_offset"]), int(e["name_length"]), at)
            if name and (name.startswith(".") or not _FILE_NAME.issuperset(name)):
                self.fault("file-name", at, f"embedded file {name[:80]!r}")
            if any(bytes(e["reserved"])):
                self.fault("index-reserved", at + 6, f"embedded file {name}: reserved bytes are not zero")
            record, end = self.resident_record(e["record"], at + 8, name, L.align(end, L.PART_ALIGNMENT))
            self.unique(name, self.contents.files, at)
            self.contents.files[name] = record
        self.fills(L.BNDL, end)

    # -- layouts and experts -----------------------------------------------------------------------

    def layouts(self) -> None:
        data, base = self.section(L.LAYT), self.by_type[L.LAYT].offset
        if len(data) < L.LAYOUT_HEAD.itemsize:
            self.stop("index-size", base, f"LAYT has {len(data)} bytes")
        head = np.frombuffer(data[: L.LAYOUT_HEAD.itemsize], L.LAYOUT_HEAD)[0]
        layouts, tensors = int(head["layout_count"]), int(head["tensor_count"])
        if layouts > L.MAX_LAYOUTS or tensors > L.MAX_TENSORS:
            self.stop("index-count", base, f"LAYT: {layouts} layouts, {tensors} tensors")
        first = L.LAYOUT_HEAD.itemsize + layouts * L.LAYOUT.itemsize
        if len(data) != first + tensors * L.TENSOR.itemsize:
            self.stop("index-size", base, f"LAYT has {len(data)} bytes for {layouts} layouts and {tensors} tensors")
        entries = np.frombuffer(data[first:], L.TENSOR)
        next_tensor, found = 0, []
        for i, e in enumerate(np.frombuffer(data[L.LAYOUT_HEAD.itemsize : first], L.LAYOUT)):
            at = base + L.LAYOUT_HEAD.itemsize + i * L.LAYOUT.itemsize
            count, end = int(e["tensor_count"]), 0
            if int(e["first_tensor"]) != next_tensor or next_tensor + count > tensors:
                self.stop("layout-range", at, f"layout {i}: tensors {int(e['first_tensor'])} + {count} of {tensors}")
            if count == 0:
                self.fault("layout-empty", at + 4, f"layout {i} has no tensor")
            placed: dict[str, L.Tensor] = {}
            for j in range(next_tensor, next_tensor + count):
                where = base + first + j * L.TENSOR.itemsize
                tensor, end = self.tensor(entries[j], where, end, in_layout=True)
                if tensor is not None:
                    self.unique(tensor.name, placed, where)
                    placed[tensor.name] = tensor
            if len(placed) == count and int(e["raw_size"]) != end:
                self.fault("layout-raw-size", at + 8, f"layout {i}: raw_size {int(e['raw_size'])}, parts end at {end}")
            found.append(L.Layout(tuple(placed.values()), int(e["raw_size"])))
            next_tensor += count
        if next_tensor != tensors:
            self.fault("layout-range", base, f"layouts take {next_tensor} of {tensors} tensors")
        self.contents.layouts = tuple(found)

    def moe_layers(self) -> None:
        entries, base = self.index(L.MOEL, L.MOE_LAYER, L.MAX_MOE_LAYERS), self.by_type[L.MOEL].offset
        found: list[L.MoeLayer] = []
        paths: set[str] = set()
        for i, e in enumerate(entries):
            at = base + i * L.MOE_LAYER.itemsize
            path = self.name(int(e["name_offset"]), int(e["name_length"]), at + 8)
            self.unique(path, paths, at + 8)
            paths.add(path)
            layer = L.MoeLayer(int(e["layer"]), path, int(e["expert_count"]))
            if found and layer.layer <= found[-1].layer:
                self.fault("moe-layer-unsorted", at, f"layer {layer.layer} after {found[-1].layer}")
            if layer.expert_count == 0:
                self.fault("moe-layer-experts", at + 4, f"layer {layer.layer} has no experts")
            if any(bytes(e["reserved"])):
                self.fault("index-reserved", at + 14, f"layer {layer.layer}: reserved bytes are not zero")
            found.append(layer)
        self.contents.moe_layers = tuple(found)
        if self.faults:
            raise _Stop

    def experts(self) -> None:
        entries, base = self.index(L.EXPI, L.EXPERT, L.MAX_EXPERT_RECORDS), self.by_type[L.EXPI].offset
        if not self.check_experts_listed(entries, base):
            raise _Stop
        at = base + np.arange(len(entries)) * L.EXPERT.itemsize + 8
        r = entries["record"]
        stored, raw, codec = r["stored_size"], r["raw_size"], r["codec"]

        def report(code: str, bad: np.ndarray[Any, Any], shift: int, what: str) -> bool:
            for i in np.flatnonzero(bad):
                e = entries[i]
                self.fault(code, int(at[i]) + shift, f"layer {int(e['layer'])} expert {int(e['expert'])}: {what}")
            return bool(bad.any())

        report("record-codec", ~np.isin(codec, list(L.CODECS)), 24, "unknown codec")
        report("index-reserved", r["reserved"].view("<u4") != 0, 28, "reserved bytes are not zero")
        report("record-empty", stored == 0, 8, "no bytes")
        if report("record-limit", (stored > L.MAX_RECORD_SIZE) | (raw > L.MAX_RECORD_SIZE), 8, "too many bytes"):
            raise _Stop
        report("record-size", (codec == L.RAW) & (stored != raw), 8, "stored and raw size differ")
        if not report("record-layout", r["layout"] >= len(self.contents.layouts), 26, "no such layout"):
            sizes = np.array([layout.raw_size for layout in self.contents.layouts], np.uint64)
            report("record-raw-size", raw != sizes[r["layout"]], 16, "raw_size is not that of its layout")
        start, alignment = self.by_type[L.SHRD].offset, self.contents.record_alignment
        padded = (stored.astype(np.int64) + alignment - 1) // alignment * alignment
        expected = start + np.concatenate([[0], np.cumsum(padded)])
        report(
            "record-offset",
            r["offset"].astype(np.uint64) != expected[:-1].astype(np.uint64),
            0,
            "not where it should lie",
        )
        self.fills(L.SHRD, int(expected[-1]))
        self.contents.experts = entries

    def check_experts_listed(self, entries: np.ndarray[Any, Any], base: int) -> bool:
        """EXPI lists (layer, expert) for exactly the experts of MOEL, in order."""
        layers = self.contents.moe_layers
        counts = {layer.layer: layer.expert_count for layer in layers}
        if sum(counts.values()) == len(entries):
            wanted_layer = np.repeat([x.layer for x in layers], [x.expert_count for x in layers])
            wanted_expert = np.concatenate([np.arange(x.expert_count) for x in layers])
            if np.array_equal(entries["layer"], wanted_layer) and np.array_equal(entries["expert"], wanted_expert):
                return True
        seen: set[tuple[int, int]] = set()
        last = (-1, -1)
        for i, (layer, expert) in enumerate(zip(entries["layer"].tolist(), entries["expert"].tolist(), strict=True)):
            at = base + i * L.EXPERT.itemsize
            if layer not in counts:
                self.fault("expert-layer", at, f"layer {layer} is not in MOEL")
            elif expert >= counts[layer]:
                self.fault("expert-range", at + 4, f"layer {layer} expert {expert} of {counts[layer]}")
            elif (layer, expert) in seen:
                self.fault("expert-duplicate", at, f"layer {layer} expert {expert} occurs twice")
            elif (layer, expert) < last:
                self.fault("expert-unsorted", at, f"layer {layer} expert {expert} after {last}")
            seen.add((layer, expert))
            last = max(last, (layer, expert))
        missing = sum(counts.values()) - len({pair for pair in seen if pair[1] < counts.get(pair[0], 0)})
        if missing:
            self.fault("expert-missing", base, f"{missing} experts have no record")
        return False
