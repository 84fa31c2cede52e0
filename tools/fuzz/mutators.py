"""Changes to a `.squizd` file that leave the rest of it in order, so that they are not all stopped by a digest.

`mutate` changes one section, one record, one number, one word of JSON, or anything at all; then it makes digests,
and where it can the places of sections, right again. It must cope with files that are no files any more.
"""

from __future__ import annotations

import contextlib
import random
import re
import struct
from collections.abc import Callable

import numpy as np
import xxhash
import zstandard
from compare import NUMBERS, reseal

from squizd.container import layout as L

Generic = Callable[[bytes, int], bytes]  # (data, most bytes) -> changed data

APPENDICES = {L.PROF, L.SPRS, L.DRFT}
INDEXES = {L.FILE: L.EMBEDDED, L.TENS: L.RESIDENT, L.EXPI: L.EXPERT}
WORD = re.compile(rb'"[^"\n]*"|-?[0-9][0-9.eE+-]*|true|false|null|[^\s]')
WORDS = [b"0", b"1", b"2", b"3", b"4", b"-1", b"-0", b"1.5", b"1e400", b"1e-400", b"99", b"9007199254740991", b"1e999"]
WORDS += [b"9007199254740992", b"true", b"null", b'""', b"[]", b"{}", b"[0]", b"[0,1,1]", b'"' + b"0" * 16 + b'"']
WORDS += [b'"\\ud800"', b'"\xff"', b"[" * 33, b",", b"}", b"]", b"\n", b"\\", b'"kind"', b'"layer"', b"0,0", b""]


def spans(data: bytes | bytearray) -> dict[bytes, tuple[int, int]]:
    """Where the directory says that sections lie, of those that lie in the file."""
    found = {}
    for at in entries(data):
        offset, size = struct.unpack_from("<QQ", data, at + 8)
        if offset + size <= len(data) and size:
            found[bytes(data[at : at + 4])] = offset, size
    return found


def entries(data: bytes | bytearray) -> range:
    """Where the entries of the directory lie, of those that can."""
    count = min(struct.unpack_from("<I", data, 48)[0], 64, (len(data) - 256) // 64) if len(data) >= 256 else 0
    return range(256, 256 + 64 * count, 64)


def records(data: bytearray) -> list[tuple[int, int, int]]:
    """Every record that lies in the file: where it is, its size, and where its digest is."""
    found, places = [], spans(data)
    for kind, entry in INDEXES.items():
        offset, size = places.get(kind, (0, 0))
        rows = np.frombuffer(data, entry, min(size // entry.itemsize, 4096), offset)["record"].tolist() if size else []
        for i, (start, stored, *_) in enumerate(rows):
            if start + stored <= len(data):
                found.append((start, stored, offset + (i + 1) * entry.itemsize - 8))
    return found


def reseal_all(data: bytearray) -> bytearray:
    """Every digest made right that can be found: records first, also where an appendix says them in hexadecimal."""
    for start, size, at in records(data):
        old = struct.unpack_from("<Q", data, at)[0]
        new = xxhash.xxh64_intdigest(bytes(data[start : start + size]))
        struct.pack_into("<Q", data, at, new)
        if new != old:
            data[:] = data.replace(b"%016x" % old, b"%016x" % new)
    return reseal(data)


def reword(data: bytearray, source: random.Random) -> bytearray:
    """One to three words of a JSON section changed; an appendix may grow, which moves those behind it."""
    places = [at for at in entries(data) if bytes(data[at : at + 4]) in {L.META, *APPENDICES}]
    if not places:
        return data
    entry = source.choice(places)
    offset, size, raw_size = struct.unpack_from("<QQQ", data, entry + 8)
    if offset + size > len(data):
        return data
    content = bytes(data[offset : offset + size])
    if data[entry + 32] == L.ZSTD:
        with contextlib.suppress(zstandard.ZstdError):
            content = zstandard.ZstdDecompressor().decompress(content, max_output_size=min(raw_size, 1 << 16))
    for _ in range(source.choice((1, 1, 1, 2, 3))):
        words = [m.span() for m in WORD.finditer(content[: 1 << 16])]
        if not words:
            break
        numbers = [span for span in words if content[span[0]] in b"-0123456789"] if source.random() < 0.5 else []
        (start, end), other = source.choice(numbers or words), source.choice(words)
        word = source.choice(WORDS) if source.random() < 0.7 else content[slice(*other)]
        if source.random() < 0.1:  # a line twice, or not at all
            start, end = content.rfind(b"\n", 0, start) + 1, content.find(b"\n", start) + 1
            word = content[start:end] * source.choice((0, 2))
        content = content[:start] + word + content[end:]
    if bytes(data[entry : entry + 4]) == L.META:
        content = content[:size].ljust(size)
        data[offset : offset + len(content)] = content
        return data
    return replace_appendix(data, entry, content)


def replace_appendix(data: bytearray, entry: int, content: bytes) -> bytearray:
    """Other bytes, stored raw, for the appendix of the directory entry at `entry`; those behind it move."""
    out, tail = bytearray(), [at for at in entries(data) if at >= entry]
    places = [struct.unpack_from("<QQ", data, at + 8) for at in tail]
    first = places[0][0]
    for at, (offset, size) in zip(tail, places, strict=True):
        stored = content if at == entry else bytes(data[offset : offset + size])
        out += bytes(-(first + len(out)) % 64)
        struct.pack_into("<QQ", data, at + 8, first + len(out), len(stored))
        if at == entry:
            struct.pack_into("<QH", data, at + 24, len(stored), L.RAW)
        out += stored
    data[first:] = out
    return data


def mutate(data: bytes, largest: int, seed: int, generic: Generic) -> bytes:
    """One change of `data` to at most `largest` bytes; `generic` changes bytes that it knows nothing about."""
    source, out = random.Random(seed), bytearray(data)
    places = spans(out)
    parts = [*places.values(), *((start, size) for start, size, _ in records(out) if size)]
    kind = source.random()
    if kind < 0.15 or not parts:
        out = bytearray(generic(bytes(out), largest))
    elif kind < 0.3:
        at, width = source.randrange(min(len(out), 4096)), source.choice((1, 2, 4, 8))
        number = source.choice((*NUMBERS, source.getrandbits(64), *(n for part in parts for n in part), len(out)))
        at -= at % width
        out[at : at + width] = struct.pack("<Q", number)[: min(width, len(out) - at)]
    elif kind < (0.7 if APPENDICES & places.keys() else 0.4):
        out = reword(out, source)
    else:
        start, size = source.choice(parts)
        if size > 256 and source.random() < 0.7:  # a window: what changes is near what is read together
            start, size = start + source.randrange(size - 128), 128
        piece = generic(bytes(out[start : start + size]), size)
        out[start : start + size] = (piece + bytes(out[start + len(piece) : start + size]))[:size]
    if len(out) >= 256 and source.random() < 0.7:
        struct.pack_into("<Q", out, 32, len(out))
    kind = source.random()
    return bytes((reseal_all if kind < 0.8 else reseal)(out) if kind < 0.95 else out)[:largest]
