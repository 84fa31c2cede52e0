"""One record: from stored bytes to decoded bytes (spec, "Records"). The only user of zstandard for reading."""

from __future__ import annotations

import xxhash
import zstandard

from .faults import Fault
from .layout import MAX_ZSTD_WINDOW, RAW, Bytes, Record

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_BLOCK = 1 << 17  # the most that one zstd block decodes to


def check_digest(stored: Bytes, record: Record) -> bool:
    """Whether `stored` are the bytes that the index promises."""
    return len(stored) == record.stored_size and xxhash.xxh64_intdigest(stored) == record.digest


def check_frame(stored: Bytes, record: Record) -> Fault | None:
    """The first rule that the zstd frame's header breaks; decodes nothing and allocates nothing."""

    def fault(code: str, message: str) -> Fault:
        return Fault(code, record.offset, message)

    data = bytes(stored[:18])
    if len(data) >= 4 and data[1:4] == b"\x2a\x4d\x18" and data[0] & 0xF0 == 0x50:
        return fault("zstd-skippable", "a skippable frame")
    if data[:4] != _ZSTD_MAGIC:
        return fault("zstd-magic", "not a zstd frame")
    try:
        frame = zstandard.get_frame_parameters(data)
    except zstandard.ZstdError as error:
        return fault("zstd-header", f"zstd frame header: {error}")
    if data[4] & 0x08:
        return fault("zstd-header", "the frame header's reserved bit is set")
    if frame.content_size == zstandard.CONTENTSIZE_UNKNOWN or frame.content_size < 0:
        return fault("zstd-size-absent", "the frame does not state its content size")
    if frame.content_size != record.raw_size:
        return fault("zstd-size-mismatch", f"the frame states {frame.content_size} bytes, the index {record.raw_size}")
    if data[4] & 0x03:
        return fault("zstd-dictionary", "the frame asks for a dictionary")
    if not frame.has_checksum:
        return fault("zstd-checksum-missing", "the frame has no checksum")
    if frame.window_size > MAX_ZSTD_WINDOW:
        return fault("zstd-window", f"window of {frame.window_size} bytes")
    end, capacity = _walk_blocks(stored, zstandard.frame_header_size(data))
    if end > len(stored):
        return fault("zstd-corrupt", "the zstd frame is cut short")
    if end < len(stored):
        return fault("zstd-trailing", f"{len(stored) - end} bytes after the zstd frame")
    if capacity < record.raw_size:
        return fault("zstd-corrupt", f"the frame's blocks cannot hold {record.raw_size} bytes")
    return None


def _walk_blocks(stored: Bytes, at: int) -> tuple[int, int]:
    """(where the frame with checksum ends, the most it can decode to), from block headers alone (RFC 8878, 3.1.1.2)."""
    capacity, last = 0, False
    while not last:
        if at + 3 > len(stored):
            return len(stored) + 1, 0
        header = int.from_bytes(stored[at : at + 3], "little")
        last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        at += 3 + (1 if kind == 1 else size)
        capacity += size if kind < 2 else _BLOCK
    return at + 4, capacity


def decode(stored: Bytes, record: Record) -> tuple[memoryview, Fault | None]:
    """Decoded bytes of a record whose digest was checked, or the rule that its frame breaks.

    Allocates at most `raw_size` bytes, and those only when the frame's blocks can hold them.
    """
    if record.codec == RAW:
        return memoryview(stored), None
    fault = check_frame(stored, record)
    if fault is not None:
        return memoryview(b""), fault
    try:
        out = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW).decompress(
            stored, max_output_size=record.raw_size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        return memoryview(b""), Fault("zstd-corrupt", record.offset, f"zstd: {error}")
    if len(out) != record.raw_size:
        return memoryview(b""), Fault("zstd-corrupt", record.offset, f"{len(out)} bytes decoded, not {record.raw_size}")
    return memoryview(out), None


def encode(raw: Bytes, level: int = 3) -> bytes:
    """One zstd frame as the spec wants it: size and checksum stated, no dictionary, window ≤ 8 MiB."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, window_log=min(23, max(10, (len(raw) - 1).bit_length())), write_checksum=1, write_content_size=1
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(raw)
