"""One record: from stored bytes to decoded bytes and back (spec, "Records")."""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from . import frames
from .faults import Fault
from .layout import MAX_ZSTD_RATIO, RAW, ZSTD, Bytes, Record


def check_digest(stored: Bytes, record: Record) -> bool:
    """Whether `stored` are the bytes that the index promises."""
    return len(stored) == record.stored_size and xxhash.xxh64_intdigest(stored) == record.digest


def decode(stored: Bytes, record: Record) -> tuple[memoryview, Fault | None]:
    """Decoded bytes of a record whose digest was checked, or the rule that its frame breaks.

    Allocates `raw_size` bytes, which a valid index bounds by 64 times the stored size.
    """
    if record.codec == RAW:
        return memoryview(stored), None
    try:
        return memoryview(frames.decompress(stored, record.raw_size)), None
    except frames.FrameError as error:
        return memoryview(b""), Fault(error.code, record.offset, str(error))


def encode(raw: Bytes, codec: int, parts: Sequence[int] = ()) -> tuple[int, Bytes]:
    """(codec, stored bytes) of a record: raw where `codec` asks for it, or where zstd saves nothing or too much.

    `parts`: as `frames.compress` takes them.
    """
    if codec == ZSTD:
        stored = frames.compress(raw, parts=parts)
        if len(stored) < len(raw) <= len(stored) * MAX_ZSTD_RATIO:
            return ZSTD, stored
    return RAW, raw
