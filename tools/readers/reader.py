#!/usr/bin/env python3
"""A reader and validator of .squizd files, written from spec/squizd.md with nothing but the standard library.

Usage: reader.py list FILE | verify FILE... | tensor FILE NAME | expert FILE LAYER EXPERT
Exit code: 0 valid, 1 invalid, 2 cannot read. Numbers in parentheses are sections of the specification.
"""
import json
import os
import re
import struct
import sys
import tempfile
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import accumulate, islice
from math import isfinite, isinf, ldexp, prod
from typing import IO, Any, NamedTuple

try:
    from compression import zstd  # Python 3.14 and later
except ImportError:
    zstd = None  # type: ignore[assignment]

HEAD, DATA = "META STRS FILE TENS LAYT MOEL EXPI".split(), "BNDL RESD SHRD".split()
APPENDICES = {"PROF": "profile", "SPRS": "sparsity", "DRFT": "draft", "ASTC": "", "ANEC": ""}
RANKS = {"gate_proj": 0, "up_proj": 1, "down_proj": 2, "fc1": 0, "fc2": 1}
INDEXES = {"FILE": (48, 256), "TENS": (136, 1 << 14), "LAYT": (1, 1 << 24), "MOEL": (16, 1 << 12),
           "EXPI": (48, 1 << 17)}  # bytes of an entry, most entries; those of LAYT follow from its counts
TENSOR, RECORD = "IHHBBBBI10Q", "QQQHH4sQ"
DTYPES = " f32 f16 bf16 u8 i8 u16 i16 u32 i32 u64 i64".split(" ")
FORMS, WIDTHS = " feHBbHhIiQq", (0, 4, 2, 2, 1, 1, 2, 2, 4, 4, 8, 8)  # of struct, in bytes
MODES = "raw affine mxfp4 mxfp8 nvfp4".split()
MICROSCALING = ((2, 4, 32), (3, 8, 32), (4, 4, 16))  # mode, bits, group size
LARGEST = (0.0, (2 - 2.0**-23) * 2.0**127, 65504.0, (2 - 2.0**-7) * 2.0**127)  # f32, f16, bf16
NANS = {2: ((1, "e8m0-nan", b"\xff"),), 3: ((1, "e8m0-nan", b"\xff"), (0, "e4m3-nan", b"\x7f\xff")),
        4: ((1, "e4m3-nan", b"\x7f\xff"),)}  # mode: part, code, bytes that are no numbers
TOP_SCALE = {2: (0, 252, 140, 252), 3: (0, 246, 134, 246), 4: (0, 255, 255, 255)}
E2M1 = [sign * x for sign in (1.0, -1.0) for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
E4M3 = [(-1.0 if c & 128 else 1.0) * (ldexp(8 + c % 8, (c >> 3 & 15) - 10) if c & 120 else ldexp(c % 8, -9))
        for c in range(256)]
BARE = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9_-])?")
SIBLING = {"name": "string", "size": "count", "file_id": "sha256"}
SOURCE = {"repo?": "string", "revision?": "string", "files?": [{"name": "string", "size": "count", "sha256": "sha256"}]}
METADATA = {  # (7); a question mark stands for optional members
    "model": {"config": {"model_type": "string"}}, "recipe": {"name?": "string", "quantizer?": "string"},
    "provenance": {"tool?": "string", "version?": "string", "source?": SOURCE, "calibration?": {"sha256?": "sha256"}},
    "licence?": "string", "description?": "string", "set?": {"index": "count", "count": "count"}, "siblings?": [SIBLING]}
PROFILE = {"layer": "count", "counts": ["integer"], "gate_mass": ["number"], "coactivation?": ["triple"]}
CLUSTERS = {"clusters": "integer", "boundaries": ["integer"], "histogram": ["number"], "predictor": {"kind": "string"},
            "digest": "digest"}
DRAFT = {"kind": "string", "hidden": "count", "source_layers": ["integer"],
         "tensors": [{"name": "string", "digest": "digest"}]}
TYPES = {
    "string": lambda v: isinstance(v, str), "integer": lambda v: type(v) is int,
    "number": lambda v: type(v) in (int, float), "count": lambda v: type(v) is int and v >= 0,
    "triple": lambda v: isinstance(v, list) and [type(x) for x in v] == [int] * 3,
    "digest": lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{16}", v),
    "sha256": lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v)}
Section = NamedTuple("Section", [("type", str), ("offset", int), ("stored", int), ("raw", int), ("codec", int),
                                 ("digest", int), ("end", int)])
Record = NamedTuple("Record", [("offset", int), ("stored", int), ("raw", int), ("codec", int), ("layout", int),
                               ("reserved", bytes), ("digest", int)])
Tensor = NamedTuple("Tensor", [("name", str), ("role", int), ("mode", int), ("dtype", int), ("bits", int),
                               ("group", int), ("shape", list[int]), ("parts", list[tuple[int, int]])])


class Bad(Exception):
    """The first broken rule, and the offset of what breaks it."""


class Unreadable(Exception):
    """What was asked for is not there, or needs what this Python lacks."""


def check(at: int, **rules: object) -> None:
    """Raise the first rule that does not hold; its name is the error code."""
    for rule, holds in rules.items():
        if not holds:
            raise Bad(rule.replace("_", "-"), at)


def align(x: int, a: int) -> int:
    """Return the smallest multiple of a that is not below x."""
    return -(-x // a) * a


def get(file: IO[bytes], offset: int, size: int) -> bytes:
    """Read exactly size bytes."""
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise Unreadable("the file changed while it was read")
    return data


def chunks(file: IO[bytes], start: int, stop: int) -> Iterator[bytes]:
    """Read [start, stop) in pieces of 1 MiB."""
    for at in range(start, stop, 1 << 20):
        yield get(file, at, min(1 << 20, stop - at))


def zeros(file: IO[bytes], start: int, stop: int, at: int | None = None) -> None:
    """Check padding."""
    for i, chunk in enumerate(chunks(file, start, stop)):
        first = len(chunk) - len(chunk.lstrip(b"\0"))
        check(start + (i << 20) + first if at is None else at, padding_nonzero=first == len(chunk))


def xxh64(pieces: Iterable[bytes]) -> int:
    """Return the XXH64 with seed 0; every piece but the last has a multiple of 32 bytes."""
    p1, p2, p3, p4, p5 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63,
                          0x27D4EB2F165667C5)
    mask, total, rest = (1 << 64) - 1, 0, b""
    a, b, c, d = p1 + p2 & mask, p2, 0, -p1 & mask
    for piece in pieces:
        whole = len(piece) & ~31
        for w, x, y, z in struct.iter_unpack("<4Q", memoryview(piece)[:whole]):
            a, b, c, d = a + w * p2 & mask, b + x * p2 & mask, c + y * p2 & mask, d + z * p2 & mask
            a, b = (a << 31 | a >> 33) * p1 & mask, (b << 31 | b >> 33) * p1 & mask
            c, d = (c << 31 | c >> 33) * p1 & mask, (d << 31 | d >> 33) * p1 & mask
        total, rest = total + len(piece), piece[whole:]

    def rotate(x: int, bits: int) -> int:
        return (x << bits | (x & mask) >> 64 - bits) & mask

    h = p5
    if total >= 32:
        h = rotate(a, 1) + rotate(b, 7) + rotate(c, 12) + rotate(d, 18) & mask
        for lane in (a, b, c, d):
            h = (h ^ rotate(lane * p2 & mask, 31) * p1 & mask) * p1 + p4 & mask
    h = h + total & mask
    words = len(rest) // 8 * 8
    for (w,) in struct.iter_unpack("<Q", rest[:words]):
        h = rotate(h ^ rotate(w * p2 & mask, 31) * p1 & mask, 27) * p1 + p4 & mask
    if len(rest) - words >= 4:
        h = rotate(h ^ int.from_bytes(rest[words : words + 4], "little") * p1 & mask, 23) * p2 + p3 & mask
        words += 4
    for byte in rest[words:]:
        h = rotate(h ^ byte * p5 & mask, 11) * p1 & mask
    h = (h ^ h >> 33) * p2 & mask
    h = (h ^ h >> 29) * p3 & mask
    return h ^ h >> 32


def document(data: bytes, at: int) -> Any:
    """Parse restricted JSON (6)."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise Bad("json-utf8", at) from None
    outside = re.sub(r'"[^"]*"?', "", re.sub(r'\\[\\"]', "", text))
    depth = max(accumulate(1 if c in "[{" else -1 for c in re.findall(r"[][{}]", outside)), default=0)
    check(at, json_utf8=text[:1] != "\ufeff", json_tokens=sum(map(outside.count, ",[{")) <= 1 << 17,
          json_depth=depth <= 32)
    fine = {"json_number": True, "json_duplicate_key": True, "json_string": True}

    def integer(digits: str) -> int:
        value = int(digits) if len(digits) <= 17 else 1 << 53
        fine["json_number"] &= abs(value) < 1 << 53
        return value

    def real(digits: str) -> float:
        fine["json_number"] &= not isinf(float(digits))
        return float(digits)

    def pairs(members: list[tuple[str, Any]]) -> dict[str, Any]:
        fine["json_duplicate_key"] &= len(dict(members)) == len(members)
        return dict(members)

    try:
        value = json.loads(text, parse_int=integer, parse_float=real, object_pairs_hook=pairs, parse_constant=int)
    except ValueError:  # also what int says to NaN and Infinity
        raise Bad("json-syntax", at) from None
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            fine["json_string"] &= not re.search("[\0\ud800-\udfff]", item)
        elif isinstance(item, (dict, list)):
            stack += [*item, *item.values()] if isinstance(item, dict) else item
    check(at, **fine)
    return value


def fits(value: Any, kind: Any) -> bool:
    """Tell whether a value has the members and types of a schema."""
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(
            fits(value[key.rstrip("?")], sub) if key.rstrip("?") in value else key.endswith("?")
            for key, sub in kind.items())
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(item, kind[0]) for item in value)
    return bool(TYPES[kind](value))


def unzstd(file: IO[bytes], at: int, size: int, raw_size: int) -> IO[bytes] | None:
    """Check a frame (13) and decode it into a temporary file; None where this Python has no zstd."""
    head, end = get(file, at, min(size, 18)), at + size
    check(at, zstd_skippable=head[1:4] != b"\x2a\x4d\x18" or head[0] >> 4 != 5, zstd_magic=head[:4] == b"\x28\xb5\x2f\xfd",
          zstd_header=len(head) > 4 and not head[4] & 24)
    flags, single = head[4], head[4] >> 5 & 1
    field = (single, 2, 4, 8)[flags >> 6]
    length = 6 - single + (0, 1, 2, 4)[flags & 3] + field
    content = int.from_bytes(head[length - field : length], "little") + 256 * (field == 2)
    base = 1 << 10 + (head[5:6] or b"\0")[0] // 8
    window = content if single else base + base // 8 * ((head[5:6] or b"\0")[0] % 8)
    check(at, zstd_header=len(head) >= length, zstd_size_absent=field, zstd_size_mismatch=content == raw_size,
          zstd_dictionary=not flags & 3, zstd_checksum_missing=flags & 4, zstd_window=window <= 1 << 23)
    place, blocks, block = at + length, 0, 0
    while not block & 1:
        check(place, zstd_truncated=place + 3 <= end)
        block, blocks = int.from_bytes(get(file, place, 3), "little"), blocks + 1
        kind, taken = block >> 1 & 3, block >> 3
        check(place, zstd_block=kind < 3 and taken <= min(window, 1 << 17), zstd_blocks=blocks <= 16 + size // 64)
        place += 3 + (1 if kind == 1 else taken)
    check(place, zstd_truncated=place + 4 <= end, zstd_trailing=place + 4 == end)
    if zstd is None:
        return None
    # The frame is decoded as one without checksum: so a wrong checksum is told from damaged blocks.
    out, decoder, total = tempfile.SpooledTemporaryFile(1 << 24), zstd.ZstdDecompressor(), 0
    try:
        for start, chunk in zip(range(at, place, 1 << 20), chunks(file, at, place)):
            data = chunk if start != at else chunk[:4] + bytes([flags & ~4]) + chunk[5:]
            while data or not (decoder.needs_input or decoder.eof):
                piece, data = decoder.decompress(data, 1 << 20), b""
                total += out.write(piece)
                check(at, zstd_corrupt=total <= raw_size)
    except (zstd.ZstdError, EOFError):
        raise Bad("zstd-corrupt", at) from None
    check(at, zstd_corrupt=decoder.eof and total == raw_size)
    checksum = int.from_bytes(get(file, place, 4), "little")
    check(at, zstd_checksum=xxh64(chunks(out, 0, total)) & 0xFFFFFFFF == checksum)  # type: ignore[arg-type]
    return out  # type: ignore[return-value]


def numbers(data: bytes, dtype: int) -> tuple[Any, ...]:
    """Return elements of a dtype."""
    if dtype != 3:
        return struct.unpack(f"<{len(data) // WIDTHS[dtype]}{FORMS[dtype]}", data)
    wide = bytearray(2 * len(data))  # bf16 is the upper half of f32
    wide[2::4], wide[3::4] = data[::2], data[1::2]
    return struct.unpack(f"<{len(data) // 2}f", wide)


def single(values: list[float]) -> tuple[float, ...]:
    """Round to f32."""
    return struct.unpack(f"<{len(values)}f", struct.pack(f"<{len(values)}f", *values))


def dequantize(file: IO[bytes], base: int, t: Tensor) -> Iterator[Any]:
    """Return the values of a tensor (14), whose record starts at base."""
    (codes, size), (scales, _), (biases, _) = t.parts
    if t.mode == 0:
        for chunk in chunks(file, base + codes, base + codes + size):
            yield from numbers(chunk, t.dtype)
        return
    width, step = WIDTHS[t.dtype] if t.mode == 1 else 1, t.group * t.bits // 8
    for g in range(prod(t.shape) // t.group):
        word = int.from_bytes(get(file, base + codes + g * step, step), "little")
        q = [word >> i & (1 << t.bits) - 1 for i in range(0, 8 * step, t.bits)]
        scale = get(file, base + scales + g * width, width)
        if t.mode == 1:
            (s,), (b,) = numbers(scale, t.dtype), numbers(get(file, base + biases + g * width, width), t.dtype)
            yield from single([x + b for x in single([s * x for x in q])])
        else:
            s = E4M3[scale[0]] if t.mode == 4 else ldexp(1, scale[0] - 127)
            yield from [s * (E4M3 if t.mode == 3 else E2M1)[x] for x in q]


