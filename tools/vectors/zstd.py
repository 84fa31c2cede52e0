"""zstd frames written by hand (RFC 8878): every header form that the format allows, and every fault.

Blocks are raw or RLE; frames with compressed blocks are constants in `valid`, made once with zstd 1.5.7,
so that the vectors do not depend on the version of a library.
"""

from __future__ import annotations

import xxhash

MAGIC = b"\x28\xb5\x2f\xfd"


def checksum(content: bytes) -> bytes:
    """The low 32 bits of the content's XXH64, little-endian."""
    return (xxhash.xxh64_intdigest(content) & 0xFFFFFFFF).to_bytes(4, "little")


def block(kind: int, size: int, content: bytes, last: bool) -> bytes:
    """One block: `kind` 0 raw, 1 RLE, 2 compressed, 3 reserved."""
    return (int(last) | kind << 1 | size << 3).to_bytes(3, "little") + content


def blocks(content: bytes, size: int = 1 << 17) -> bytes:
    """The content as raw and RLE blocks of at most `size` bytes."""
    out, pieces = b"", [content[i : i + size] for i in range(0, len(content), size)] or [b""]
    for i, piece in enumerate(pieces):
        last = i + 1 == len(pieces)
        if len(piece) > 1 and len(set(piece)) == 1:
            out += block(1, len(piece), piece[:1], last)
        else:
            out += block(0, len(piece), piece, last)
    return out


def header(
    size: int | None, window: int | None = None, has_checksum: bool = True, flags: int = 0, width: int = 0
) -> bytes:
    """A frame header. `window`: its descriptor byte, or None for a single segment. `width`: bytes of the size."""
    widths = {1: 0, 2: 1, 4: 2, 8: 3}
    single = window is None
    descriptor = int(single) << 5 | int(has_checksum) << 2 | flags
    out = b"" if single else bytes([window or 0])
    if size is not None:
        if not width:
            width = 1 if single and size < 256 else 2 if 256 <= size < 256 + 65536 else 4 if size < 1 << 32 else 8
        descriptor |= widths[width] << 6
        out += (size - 256 if width == 2 else size).to_bytes(width, "little")
    return MAGIC + bytes([descriptor]) + out


def frame(content: bytes, window: int | None = None, size: int = 1 << 17, width: int = 0) -> bytes:
    """A whole valid frame."""
    return header(len(content), window, width=width) + blocks(content, size) + checksum(content)
