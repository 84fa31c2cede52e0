"""zstd frames as the format allows them (spec, "zstd"; RFC 8878). The only user of zstandard.

A frame is checked from its headers alone before a byte is decoded; decoding then takes memory for the
window and the caller's buffer, whatever the frame claims.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import xxhash
import zstandard

from .layout import MAX_ZSTD_WINDOW, ZSTD_BLOCK_SIZE, Bytes

MAGIC = b"\x28\xb5\x2f\xfd"
_CHECKSUM_SIZE = 4
_CHECKSUM_FLAG = 4
_DESCRIPTOR_AT = 4
_LONGEST_HEADER = 18
_STEP = 1 << 17  # most bytes of a frame that the decoder is given at once


class FrameError(ValueError):
    """A frame breaks the rule `code`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """What a frame's header says (RFC 8878, 3.1.1.1)."""

    size: int  # of the header itself, magic included
    content_size: int
    window: int


class Source:
    """Stored bytes of one record that can be read at any place; fewer come back only past the end."""

    size: int

    def read(self, offset: int, size: int) -> Bytes:
        """At most `size` bytes at `offset`."""
        raise NotImplementedError


class MemorySource(Source):
    """Stored bytes that are in memory."""

    def __init__(self, stored: Bytes) -> None:
        self._stored, self.size = memoryview(stored), len(stored)

    def read(self, offset: int, size: int) -> Bytes:
        """See Source."""
        return self._stored[offset : offset + size]


def read_header(start: Bytes, raw_size: int) -> FrameHeader:
    """Check the frame header at the start of `start`; raises FrameError for the first broken rule."""
    data = bytes(start[:_LONGEST_HEADER])
    if len(data) >= 4 and data[1:4] == b"\x2a\x4d\x18" and data[0] & 0xF0 == 0x50:
        raise FrameError("zstd-skippable", "a skippable frame")
    if data[:4] != MAGIC:
        raise FrameError("zstd-magic", "not a zstd frame")
    descriptor = data[_DESCRIPTOR_AT] if len(data) > _DESCRIPTOR_AT else 0
    single, size_flag, dictionary_flag = descriptor >> 5 & 1, descriptor >> 6, descriptor & 3
    size_at = 5 + (not single) + (0, 1, 2, 4)[dictionary_flag]
    size_bytes = (single, 2, 4, 8)[size_flag]
    if len(data) < max(5, size_at + size_bytes) or descriptor & 0x18:
        raise FrameError("zstd-header", "the frame header is cut short or has a reserved bit set")
    if size_bytes == 0:
        raise FrameError("zstd-size-absent", "the frame does not state its content size")
    content_size = int.from_bytes(data[size_at : size_at + size_bytes], "little") + (256 if size_flag == 1 else 0)
    if content_size != raw_size:
        raise FrameError("zstd-size-mismatch", f"the frame states {content_size} bytes, the index {raw_size}")
    if dictionary_flag:
        raise FrameError("zstd-dictionary", "the frame names a dictionary")
    if not descriptor & _CHECKSUM_FLAG:
        raise FrameError("zstd-checksum-missing", "the frame has no checksum")
    if single:
        window = content_size
    else:
        window = 1 << 10 + (data[5] >> 3)
        window += window // 8 * (data[5] & 7)
    if window > MAX_ZSTD_WINDOW:
        raise FrameError("zstd-window", f"window of {window} bytes")
    return FrameHeader(size_at + size_bytes, content_size, window)


def walk_blocks(source: Source, header: FrameHeader) -> None:
    """Follow the block headers (RFC 8878, 3.1.1.2) to the end of `source`; raises FrameError."""
    largest, most = min(header.window, ZSTD_BLOCK_SIZE), 16 + source.size // 64
    at, count, last = header.size, 0, False
    page, page_at = source.read(0, _PAGE), 0
    while not last:
        if at + 3 > page_at + len(page):
            page, page_at = source.read(at, _PAGE), at
        start = at - page_at
        if start < 0 or start + 3 > len(page):
            raise FrameError("zstd-truncated", "the zstd frame is cut short")
        block = page[start] | page[start + 1] << 8 | page[start + 2] << 16
        last, kind, size = bool(block & 1), block >> 1 & 3, block >> 3
        if kind == 3 or size > largest:
            raise FrameError("zstd-block", f"a block of type {kind} and {size} bytes")
        count += 1
        if count > most:
            raise FrameError("zstd-blocks", f"more than {most} blocks in {source.size} bytes")
        at += 3 + (1 if kind == 1 else size)
    end = at + _CHECKSUM_SIZE
    if end > source.size:
        raise FrameError("zstd-truncated", "the zstd frame is cut short")
    if end < source.size:
        raise FrameError("zstd-trailing", f"{source.size - end} bytes after the zstd frame")


_PAGE = 1 << 12  # of block headers; blocks are mostly larger, so each costs one small read


def check(source: Source, raw_size: int) -> FrameHeader:
    """Every rule that headers can show; raises FrameError for the first that is broken."""
    header = read_header(source.read(0, _LONGEST_HEADER), raw_size)
    walk_blocks(source, header)
    return header


class _Unchecked:
    """What zstandard reads: the frame as if it had no checksum. `stream` compares it, to tell which rule is broken."""

    def __init__(self, source: Source) -> None:
        self._source, self._at = source, 0

    def read(self, size: int) -> bytes:
        size = min(size, _STEP, self._source.size - _CHECKSUM_SIZE - self._at)
        data = bytes(self._source.read(self._at, size))
        if self._at <= _DESCRIPTOR_AT < self._at + len(data):
            patched = bytearray(data)
            patched[_DESCRIPTOR_AT - self._at] &= ~_CHECKSUM_FLAG
            data = bytes(patched)
        self._at += len(data)
        return data


def stream(source: Source, raw_size: int, buffer: bytearray | memoryview) -> Iterator[memoryview]:
    """Check and decode a frame piece by piece; each piece is a view of `buffer`, full but for the last.

    Raises FrameError where a rule is broken, possibly after some pieces.
    """
    check(source, raw_size)
    digest, done, view = xxhash.xxh64(), 0, memoryview(buffer)
    content: Any = _Unchecked(source)
    reader = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW).stream_reader(content)
    while True:
        filled = 0
        try:
            while filled < len(view) and (got := reader.readinto(view[filled:])):
                filled += got
        except zstandard.ZstdError as error:
            raise FrameError("zstd-corrupt", f"zstd: {error}") from error
        done += filled
        if done > raw_size or (filled < len(view) and done != raw_size):
            raise FrameError("zstd-corrupt", f"{done} bytes decoded, not {raw_size}")
        digest.update(view[:filled])
        if filled:
            yield view[:filled]
        if filled < len(view):
            break
    checksum = bytes(source.read(source.size - _CHECKSUM_SIZE, _CHECKSUM_SIZE))
    if int.from_bytes(checksum, "little") != digest.intdigest() & 0xFFFFFFFF:
        raise FrameError("zstd-checksum", "the decoded bytes do not match the frame's checksum")


def decompress(stored: Bytes, raw_size: int) -> bytes:
    """The content of a frame that is in memory; raises FrameError for the first broken rule."""
    source = MemorySource(stored)
    check(source, raw_size)
    try:
        out: bytes = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW).decompress(
            stored, max_output_size=raw_size, allow_extra_data=False
        )
        if len(out) == raw_size:
            return out
        raise FrameError("zstd-corrupt", f"{len(out)} bytes decoded, not {raw_size}")
    except zstandard.ZstdError as error:
        for _ in stream(source, raw_size, bytearray(1 << 16)):  # finds out which rule
            pass
        raise FrameError("zstd-corrupt", f"zstd: {error}") from error


def compress(raw: Bytes, level: int = 3, parts: Sequence[int] = ()) -> bytes:
    """One frame as the spec wants it: size and checksum stated, no dictionary, window of at most 8 MiB.

    `parts` are where numbers of another kind begin (codes, scales, biases), ascending: each gets blocks of its own,
    with an entropy code of its own. Numbers hardly repeat, so there the work goes into that code and not into a search.
    """
    window, numbers = min(23, max(10, (len(raw) - 1).bit_length())), _NUMBERS if parts else {}
    parameters = zstandard.ZstdCompressionParameters.from_level(
        1 if parts else level, window_log=window, write_checksum=1, write_content_size=1, **numbers
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    if not parts:
        frame: bytes = compressor.compress(raw)
        return frame
    view, stream = memoryview(raw), compressor.compressobj(size=len(raw))
    found = []
    for start, end in pairwise([0, *parts, len(raw)]):
        if start < end:
            found += [stream.compress(view[start:end]), stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    return b"".join([*found, stream.flush()])


# A block of literals is entropy-coded only if that saves 1/64 of it, but 1/128 with the strategies of high levels.
_NUMBERS = {
    "strategy": zstandard.STRATEGY_BTULTRA, "search_log": 1, "hash_log": 6, "chain_log": 6, "min_match": 7,
    "target_length": 1,
}  # fmt: skip
