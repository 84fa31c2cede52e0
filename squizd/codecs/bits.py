"""Codes of 1 to 8 bits as one stream of bytes, least significant bit first (spec, "Affine").

Element i is bits [i * bits, (i + 1) * bits) of the stream, bit k being bit k % 8 of byte k // 8. For 4 bits
that is low nibble first, for 8 bits it is the bytes themselves.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from squizd.container.layout import Bytes
from squizd.errors import RequestError

# Eight codes fill `bits` bytes, which fit one 64-bit word. So many words are unpacked at once: 1 MiB.
_CHUNK: Final = 1 << 17


def unpack(codes: Bytes, bits: int, count: int) -> npt.NDArray[np.uint8]:
    """The first `count` codes of a stream.

    Args:
        codes: at least ceil(count * bits / 8) bytes; what follows is not looked at.
        bits: width of a code, 1 to 8.
        count: how many codes.

    Returns:
        uint8 [count]; for 8 bits a view of `codes`.

    Raises:
        RequestError: bits is out of range, or the stream is too short.
    """
    _check_bits(bits)
    size = -(-count * bits // 8)
    stream = np.frombuffer(codes, dtype=np.uint8)
    if count < 0 or size > stream.size:
        raise RequestError(f"{count} codes of {bits} bits take {size} bytes, there are {stream.size}")
    stream = stream[:size]
    if bits == 8:
        return stream
    words = -(-count // 8)
    if size < words * bits:
        stream = np.concatenate([stream, np.zeros(words * bits - size, dtype=np.uint8)])
    octets = stream.reshape(words, bits)
    values = np.empty((words, 8), dtype=np.uint8)
    mask = np.uint64((1 << bits) - 1)
    for start in range(0, words, _CHUNK):
        part = octets[start : start + _CHUNK]
        padded = np.zeros((len(part), 8), dtype=np.uint8)
        padded[:, :bits] = part
        word = padded.view("<u8")[:, 0]
        for i in range(8):
            values[start : start + _CHUNK, i] = (word >> np.uint64(i * bits)) & mask
    return values.reshape(-1)[:count]


def pack(values: npt.ArrayLike, bits: int) -> bytes:
    """The stream of the codes `values`, in row-major order: the inverse of `unpack`.

    Args:
        values: integers of any shape in [0, 2**bits).
        bits: width of a code, 1 to 8.

    Returns:
        ceil(count * bits / 8) bytes; unused bits at the end are zero.

    Raises:
        RequestError: bits is out of range, or a value does not fit.
    """
    _check_bits(bits)
    flat = np.asarray(values).reshape(-1)
    if flat.size and (flat.dtype.kind not in "iu" or flat.min() < 0 or flat.max() >= 1 << bits):
        raise RequestError(f"codes of {bits} bits are integers from 0 to {(1 << bits) - 1}")
    padded = np.zeros((-(-flat.size // 8), 8), dtype="<u8")
    padded.reshape(-1)[: flat.size] = flat
    word = np.bitwise_or.reduce(padded << (np.arange(8, dtype="<u8") * np.uint64(bits)), axis=1)
    octets = np.ascontiguousarray(word.astype("<u8")).view(np.uint8).reshape(-1, 8)[:, :bits]
    return octets.tobytes()[: -(-flat.size * bits // 8)]


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise RequestError(f"codes have 1 to 8 bits, not {bits}")
