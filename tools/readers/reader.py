#!/usr/bin/env python3
"""Reads and validates .squizd files as spec/squizd.md says, with the standard library alone.

Usage: reader.py list FILE | verify FILE... | tensor FILE NAME | expert FILE LAYER EXPERT
Exit code: 0 valid, 1 invalid, 2 cannot read. Numbers in parentheses are sections of the specification. The offset
beside an error code is where the structure, entry, section, record or part starts that breaks the rule.
"""

import json
import os
import re
import struct
import sys
from collections import namedtuple
from collections.abc import Iterator
from itertools import accumulate, islice, pairwise
from math import ldexp, prod
from mmap import ACCESS_READ, mmap
from tempfile import TemporaryFile
from typing import Any

try:
    from compression import zstd  # Python 3.14 and later
except ImportError:
    zstd = None  # type: ignore[assignment]

ORDER = [
    "META",
    "STRS",
    "FILE",
    "TENS",
    "LAYT",
    "MOEL",
    "EXPI",
    "BNDL",
    "RESD",
    "SHRD",
]  # seven head and three data sections
APPENDICES = {"PROF": "profile", "SPRS": "sparsity", "DRFT": "draft", "ASTC": "", "ANEC": ""}
INDEXES = {
    "FILE": (48, 1 << 8),
    "TENS": (136, 1 << 14),
    "LAYT": (1, 1 << 24),
    "MOEL": (16, 1 << 12),
    "EXPI": (48, 1 << 17),
}  # size and number of entries; LAYT has counts of its own
TENSOR, RECORD = "IHHBBBBI10Q", "QQQHH4sQ"
MODES, DTYPES = (
    ["raw", "affine", "mxfp4", "mxfp8", "nvfp4"],
    ["", "f32", "f16", "bf16", "u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64"],
)
FORMS, WIDTHS = "-feHBbHhIiQq", (0, 4, 2, 2, 1, 1, 2, 2, 4, 4, 8, 8)  # of a dtype: struct's letter, bytes
INFINITY = (0, 0x7F800000, 0x7C00, 0x7F80)  # of f32, f16, bf16; the largest finite number is the one below
TOP_SCALE = {2: (0, 252, 140, 252), 3: (0, 246, 134, 246), 4: (0, 255, 255, 255)}
E2M1 = [sign * x for sign in (1.0, -1.0) for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
E4M3 = [(-1.0 if c & 128 else 1.0) * ldexp((c & 7) + 8 * (c & 120 > 0), max(c >> 3 & 15, 1) - 10) for c in range(256)]
NANS = {
    2: ((1, "e8m0-nan", b"\xff"),),
    3: ((1, "e8m0-nan", b"\xff"), (0, "e4m3-nan", b"\x7f\xff")),
    4: ((1, "e4m3-nan", b"\x7f\xff"),),
}  # of a mode: part, code, bytes that are not numbers
MICROSCALING = ((2, 4, 32), (3, 8, 32), (4, 4, 16))  # mode, bits, group size
RANKS = {"gate_proj": 0, "up_proj": 1, "down_proj": 2, "fc1": 0, "fc2": 1}
BARE = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,126}[A-Za-z0-9_-])?")
TYPES = {
    "string": lambda v: isinstance(v, str),
    "integer": lambda v: type(v) is int,
    "number": lambda v: type(v) in (int, float),
    "count": lambda v: type(v) is int and v >= 0,
    "digest": lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{16}", v),
    "sha256": lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v),
    "triple": lambda v: isinstance(v, list) and [type(x) for x in v] == [int] * 3,
}
SOURCE = {"repo?": "string", "revision?": "string", "files?": [{"name": "string", "size": "count", "sha256": "sha256"}]}
METADATA = {  # (7); a question mark stands after optional members
    "model": {"config": {"model_type": "string"}},
    "recipe": {"name?": "string", "quantizer?": "string"},
    "provenance": {"tool?": "string", "version?": "string", "source?": SOURCE, "calibration?": {"sha256?": "sha256"}},
    "licence?": "string",
    "description?": "string",
    "set?": {"index": "count", "count": "count"},
    "siblings?": [{"name": "string", "size": "count", "file_id": "sha256"}],
}
HEADERS = {
    "profile": {"tokens": "count", "text_sha256": "sha256"},
    "sparsity": {},
    "draft": {
        "kind": "string",  # (17)
        "hidden": "count",
        "source_layers": ["integer"],
        "tensors": [{"name": "string", "digest": "digest"}],
    },
}
CLUSTERS = {
    "clusters": "integer",
    "boundaries": ["integer"],
    "histogram": ["number"],
    "predictor": {"kind": "string"},
    "digest": "digest",
}
LINES = {
    "sparsity": {"layer": "count", "width": "count", "experts": [CLUSTERS]},
    "profile": {"layer": "count", "counts": ["integer"], "gate_mass": ["number"], "coactivation?": ["triple"]},
}
Section = namedtuple("Section", "at name offset stored raw codec digest end")
Record = namedtuple("Record", "offset stored raw codec layout reserved digest")
Tensor = namedtuple("Tensor", "name role mode dtype bits group shape parts")
Module = namedtuple("Module", "layer count path first")


class Bad(Exception):
    """The first broken rule, and where."""


def check(at: int, **rules: object) -> None:
    """Raise the first rule that does not hold; its name is the error code."""
    for rule, holds in rules.items():
        if not holds:
            raise Bad(rule.replace("_", "-"), at)


def align(x: int, a: int = 64) -> int:
    """Return the smallest multiple of a that is not below x."""
    return -(-x // a) * a


def little(data: Any) -> int:
    """Return the number that bytes stand for."""
    return int.from_bytes(data, "little")


def xxh64(data: Any) -> int:
    """Return the XXH64 with seed 0."""
    p, q, r, s, t = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
    m, i, rest, h = (1 << 64) - 1, len(data) & ~31, len(data) & 31, t

    def turn(x: int, bits: int) -> int:
        return (x << bits | (x & m) >> 64 - bits) & m

    if i:
        a, b, c, d = p + q & m, q, 0, -p & m
        for w, x, y, z in struct.iter_unpack("<4Q", data[:i]):
            a, b, c, d = a + w * q & m, b + x * q & m, c + y * q & m, d + z * q & m
            a, b = (a << 31 | a >> 33) * p & m, (b << 31 | b >> 33) * p & m
            c, d = (c << 31 | c >> 33) * p & m, (d << 31 | d >> 33) * p & m
        h = turn(a, 1) + turn(b, 7) + turn(c, 12) + turn(d, 18)
        for lane in (a, b, c, d):
            h = (h ^ turn(lane * q, 31) * p & m) * p + s
    h += len(data)
    for size, (f, g, bits, plus) in (
        [(8, (q, p, 27, s))] * (rest // 8) + [(4, (p, q, 23, r))] * (rest // 4 % 2) + [(1, (t, p, 11, 0))] * (rest % 4)
    ):
        word = little(data[i : i + size]) * f
        h, i = turn(h ^ (turn(word, 31) * p if size == 8 else word), bits) * g + plus, i + size
    for shift, factor in ((33, q), (29, r), (32, 1)):
        h = (h & m ^ (h & m) >> shift) * factor & m
    return h


def document(data: Any, at: int) -> Any:
    """Parse restricted JSON (6)."""
    text = str(data, "utf-8", "surrogateescape")
    outside = re.sub(r'"[^"]*"?', "", re.sub(r'\\[\\"]', "", text))
    depths = accumulate(1 if c in "[{" else -1 for c in outside if c in "[]{}")
    check(
        at,
        json_utf8=not re.search("^\ufeff|[\ud800-\udfff]", text),
        json_tokens=sum(map(outside.count, ",[{")) <= 1 << 17,
        json_depth=max(depths, default=0) <= 32,
    )
    fine = dict.fromkeys(("json_number", "json_duplicate_key", "json_string"), True)

    def note(rule: str, holds: bool, value: Any) -> Any:
        fine[rule] &= holds
        return value

    try:
        value = json.loads(
            text,
            parse_float=lambda s: note("json_number", abs(float(s)) < float("inf"), float(s)),
            parse_constant=int,
            parse_int=lambda s: note("json_number", len(s) < 18 and abs(int(s)) < 1 << 53, len(s) < 18 and int(s)),
            object_pairs_hook=lambda p: note("json_duplicate_key", len(dict(p)) == len(p), dict(p)),
        )
    except ValueError:  # int raises it for NaN and Infinity
        raise Bad("json-syntax", at) from None
    plain = json.dumps(value, ensure_ascii=False).replace("\\\\", "")  # a backslash that is left starts another escape
    fine["json_string"] = not re.search("[\ud800-\udfff]|\\\\u0000", plain)
    check(at, **fine)
    return value


def fits(value: Any, kind: Any) -> bool:
    """Tell whether a value has the members and types of a schema."""
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(
            fits(value[k.rstrip("?")], v) if k.rstrip("?") in value else k[-1] == "?" for k, v in kind.items()
        )
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(item, kind[0]) for item in value)
    return bool(TYPES[kind](value))


def unzstd(data: Any, at: int, raw_size: int) -> Any:
    """Check a frame (13) and decode it into a temporary file, or return None where Python has no zstd."""
    size, head = len(data), bytes(data[:18])
    check(
        at,
        zstd_skippable=head[1:4] != b"\x2a\x4d\x18" or head[0] >> 4 != 5,
        zstd_magic=head[:4] == b"(\xb5/\xfd",
        zstd_header=size > 4 and not head[4] & 24,
    )
    flags, whole = head[4], head[4] >> 5 & 1
    field = (whole, 2, 4, 8)[flags >> 6]
    i = 6 - whole + (0, 1, 2, 4)[flags & 3] + field
    check(at, zstd_header=size >= i, zstd_size_absent=field)
    content = little(head[i - field : i]) + 256 * (field == 2)
    window = content if whole else (8 + head[5] % 8) << 7 + head[5] // 8
    check(
        at,
        zstd_size_mismatch=content == raw_size,
        zstd_dictionary=not flags & 3,
        zstd_checksum_missing=flags & 4,
        zstd_window=window <= 1 << 23,
    )
    blocks = block = 0
    while not block & 1:
        block, blocks = little(data[i : i + 3]), blocks + 1
        check(
            at + i,
            zstd_truncated=i + 3 <= size,
            zstd_block=block >> 1 & 3 < 3 and block >> 3 <= min(window, 1 << 17),
            zstd_blocks=blocks <= 16 + size // 64,
        )
        i += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)
    check(at + i, zstd_truncated=i + 4 <= size, zstd_trailing=i + 4 == size)
    if zstd is None:
        return None
    out, decoder, total = TemporaryFile(), zstd.ZstdDecompressor(), 0  # noqa: SIM115 - returned, closed by the caller
    try:  # decoded as if it had no checksum: so a wrong checksum is told from damaged blocks
        for piece in (head[:4] + bytes([flags & ~4]), *(data[k : min(k + (1 << 20), i)] for k in range(5, i, 1 << 20))):
            while len(piece) or not (decoder.needs_input or decoder.eof):
                total += out.write(decoder.decompress(piece, 1 << 20))
                piece = b""
                check(at, zstd_corrupt=total <= raw_size)
    except (zstd.ZstdError, EOFError):
        raise Bad("zstd-corrupt", at) from None
    check(at, zstd_corrupt=decoder.eof and total == raw_size)
    out.flush()
    result = memoryview(mmap(out.fileno(), 0, access=ACCESS_READ))
    check(at, zstd_checksum=xxh64(result) & 0xFFFFFFFF == little(data[i:]))
    return result


def numbers(data: Any, dtype: int) -> tuple[Any, ...]:
    """Return the elements of a dtype."""
    if dtype == 3:  # bf16 is the upper half of f32
        data, dtype = b"".join(b"\0\0" + bytes(data[i : i + 2]) for i in range(0, len(data), 2)), 1
    return struct.unpack(f"<{len(data) // WIDTHS[dtype]}{FORMS[dtype]}", data)


def dequantize(raw: Any, t: Any) -> Iterator[Any]:
    """Return the values of a checked tensor (14) in a decoded record."""
    codes, scales, biases = (raw[offset : offset + size] for offset, size in t.parts)
    if t.mode == 0:
        width = WIDTHS[t.dtype]
        yield from (numbers(codes[i : i + width], t.dtype)[0] for i in range(0, len(codes), width))
    count, step, form = prod(t.shape) // (t.group or len(codes) + 1), t.group * t.bits // 8, f"<{t.group}f"
    for g in range(count if t.mode else 0):
        word, width = little(codes[g * step : g * step + step]), len(scales) // count
        q = [word >> i & (1 << t.bits) - 1 for i in range(0, 8 * step, t.bits)]
        if t.mode == 1:
            s, b = (numbers(part[g * width : g * width + width], t.dtype)[0] for part in (scales, biases))
            products = struct.unpack(form, struct.pack(form, *(s * x for x in q)))
            yield from struct.unpack(form, struct.pack(form, *(x + b for x in products)))
        else:
            s = E4M3[scales[g]] if t.mode == 4 else ldexp(1, scales[g] - 127)
            yield from ((E4M3 if t.mode == 3 else E2M1)[x] * s for x in q)


class File:
    """A .squizd file; to open it is to make all structural checks, in the order of section 21."""

    def __init__(self, path: str) -> None:
        if not os.path.isfile(path):
            raise OSError("not a file")
        with open(path, "rb") as file:
            self.data = memoryview(mmap(file.fileno(), 0, access=ACCESS_READ) if os.path.getsize(path) else b"")
        self.names, self.names_end, self.skipped = dict[Any, str](), 0, False
        h, actual = bytes(self.data[:256]), len(self.data)
        check(
            0,
            file_empty=h,
            bad_magic=h[:4] == b"SQZD"[: len(h)],
            file_short=len(h) == 256,
            text_mode_damage=h[4:8] == b"\r\n\x1a\n",
            version_zero=any(h[8:10]),
            version_byte_swapped=h[8:10] != b"\0\1",
            version_future=h[8:10] == b"\1\0",
            header_digest=xxh64(h[:248]) == little(h[248:]),
        )
        (size, required, _, total, place, count, entry, digest, self.flags, self.align, self.head_size, reserved) = (
            struct.unpack_from("<IQQQQIIQIIQ168s", h, 12)
        )
        end = 256 + 64 * count
        check(
            0,
            header_size=size == 256,
            unknown_required_feature=not required,
            file_truncated=actual >= total,
            trailing_bytes=actual == total,
            directory_offset=place == 256,
            section_count=0 < count <= 64,
            directory_entry_size=entry == 64,
            record_alignment=self.align in [1 << i for i in range(6, 25)],
            head_limit=self.head_size <= min(1 << 24, total),
            directory_range=end <= self.head_size,
            header_reserved=not any(reserved),
        )
        check(256, directory_digest=xxh64(self.data[256:end]) == digest)
        self.sections: dict[str, Any] = {}
        for at, (kind, flags, offset, stored, raw, codec, zero, digest, zeros) in self.rows(256, end, "4sIQQQH6sQ16s"):
            name, main = kind.decode("latin-1"), kind.decode("latin-1") in ORDER
            limit = 1 << (21 if name in ("META", "STRS") else 64 if main else 36)
            check(
                at,
                section_type=re.fullmatch("[A-Za-z0-9]{4}", name),
                section_flags=flags < 2,
                section_critical_flag=(name not in APPENDICES and not main) or flags == main,
                section_unknown_critical=main or not flags,
                section_empty=stored and raw,
                section_codec=codec < 2 - main,
                section_limit=max(stored, raw) <= limit,
                section_size=codec or stored == raw,
                section_ratio=not codec or raw <= 64 * stored,
                section_reserved=not any(zero + zeros),
                data_section_digest=name not in ORDER[7:] or not digest,
                section_duplicate=name not in self.sections,
            )
            self.sections[name] = Section(at, name, offset, stored, raw, codec, digest, offset + stored)
        for names in ({"META"}, {"STRS"}, {"TENS"}, {"RESD"}):
            check(256, section_missing=names <= self.sections.keys())
        for names in ({"LAYT", "MOEL", "EXPI", "SHRD"}, {"FILE", "BNDL"}):
            check(256, section_incomplete_set=len(names & self.sections.keys()) in (0, len(names)))
        rank, first = 0, end
        for s in self.sections.values():
            least, unit = rank, self.align if s.name == "SHRD" else 64
            rank = ORDER.index(s.name) if s.name in ORDER else 10
            check(
                s.at,
                section_order=rank >= least,
                section_wraps=s.end < 1 << 64,
                section_over_header=s.offset >= first,
                section_overlap=s.offset >= end,
                section_unaligned=s.offset % unit == 0,
                section_gap=s.offset == align(end, unit),
                section_range=s.end <= actual,
            )
            end = s.end
        head = [s for s in self.sections.values() if s.name in ORDER[:7]]
        check(0, section_gap=end == actual, head_size=self.head_size == head[-1].end)
        end = first
        for s in head:
            end = self.covered(s, end)
        for name, (size, most) in INDEXES.items():
            if s := self.sections.get(name):
                check(s.offset, index_size=s.stored % size == 0 and (name != "LAYT" or s.stored >= 8))
                layouts, tensors = struct.unpack_from("<II", self.data, s.offset)
                check(
                    s.offset,
                    index_size=name != "LAYT" or s.stored == 8 + 16 * layouts + 96 * tensors,
                    index_count=s.stored // size <= most,
                )
                check(s.offset, index_count=name != "LAYT" or (layouts <= 1 << 10 and tensors <= 1 << 13))
        s = self.sections["META"]
        self.metadata = m = document(self.data[s.offset : s.end], s.offset)
        check(s.offset, metadata_type=fits(m, METADATA))
        place, siblings = m.get("set", {"index": 0, "count": 1}), [x["name"] for x in m.get("siblings", ())]
        others, different = 0 if place["index"] else place["count"] - 1, {x.lower() for x in siblings}
        check(
            s.offset,
            sibling_name=all(map(BARE.fullmatch, siblings)),
            metadata_set=place["index"] < place["count"] and len(different) == len(siblings) == others,
        )
        self.indexes()
        self.experts()

    def rows(self, start: int, stop: int, form: str) -> Iterator[Any]:
        """Return the place and the fields of each entry in a table."""
        step = struct.calcsize("<" + form)
        return zip(range(start, stop, step), struct.iter_unpack("<" + form, self.data[start:stop]), strict=False)

    def index(self, name: str, form: str) -> Iterator[Any]:
        """Return the entries of an index, none where the file does not have it."""
        s = self.sections.get(name)
        return self.rows(s.offset, s.end, form) if s else iter(())

    def covered(self, s: Any, end: int) -> int:
        """Check the padding before a section with a digest, and the digest; return where the section ends."""
        check(end, padding_nonzero=not any(self.data[end : s.offset]))
        check(s.offset, section_digest=xxh64(self.data[s.offset : s.end]) == s.digest)
        return s.end

    def name(self, at: int, offset: int, length: int) -> str:
        """Check a name (5) and return it."""
        s, key = self.sections["STRS"], (offset, length)
        check(
            at,
            name_length=0 < length <= 512,
            name_range=offset + length <= s.stored,
            name_place=key in self.names or offset == self.names_end,
        )
        if key not in self.names:
            self.names_end += length
            text = str(self.data[s.offset + offset : s.offset + offset + length], "utf-8", "surrogateescape")
            check(
                at,
                name_utf8=not re.search("[\ud800-\udfff]", text),
                name_control=not re.search("[\0-\x1f\x7f-\x9f]", text),
            )
            self.names[key] = text
        return self.names[key]

    def tensor(self, at: int, fields: Any, end: int, taken: Any, expert: bool) -> Any:
        """Check a tensor (9); return it, and where its last part ends."""
        offset, length, role, mode, dtype, bits, ndim, group, *rest = fields
        name, shape = self.name(at, offset, length), rest[: min(ndim, 4)]
        affine = mode == 1 and dtype < 4 and bits in (2, 3, 4, 5, 6, 8) and group in (32, 64, 128)
        check(
            at,
            tensor_role=role < 10 and (role == 5) == expert,
            tensor_mode=mode < 5,
            tensor_dtype=0 < dtype < 12,
            tensor_encoding=mode == bits == group == 0 or affine or (dtype < 4 and (mode, bits, group) in MICROSCALING),
            tensor_dims=0 < ndim <= 4,
            tensor_unused_dim=not any(rest[ndim:4]),
            tensor_zero_dim=all(shape),
            tensor_overflow=prod(shape) <= 1 << 48,
            row_not_divisible=not group or (shape[-1:] and shape[-1] % group == 0),
        )
        n, width = prod(shape), WIDTHS[dtype]
        scales = n // group * (width if mode == 1 else 1) if mode else 0
        parts = tuple(zip(rest[4::2], rest[5::2], strict=False))
        for (offset, size), want in zip(
            parts, (n * bits // 8 if mode else n * width, scales, scales * (mode == 1)), strict=False
        ):
            check(
                at,
                part_size=size == want,
                part_range=offset + size <= 1 << 36,
                part_offset=offset == (align(end) if want else 0),
            )
            end = offset + size or end
        check(at, name_duplicate=name not in taken)
        return Tensor(name, role, mode, dtype, bits, group, shape, parts), end

    def record(self, at: int, fields: Any, end: int, raw: Any, known: bool | None = None, zero: bytes = b"") -> Any:
        """Check a record (10) that starts at end; return it."""
        r = Record(*fields)
        check(
            at,
            record_offset=r.offset == end,
            record_codec=r.codec < 2,
            record_limit=max(r.stored, r.raw) <= 1 << 36,
            record_empty=r.stored and r.raw,
            record_size=r.codec or r.stored == r.raw,
            record_ratio=not r.codec or r.raw <= 64 * r.stored,
            record_layout=r.layout == 0 if known is None else known,
            index_reserved=not any(r.reserved + zero),
            record_raw_size=raw in (None, r.raw),
        )
        return r

    def indexes(self) -> None:
        """Check FILE, TENS, LAYT and MOEL."""
        self.files, self.tensors, self.layouts, self.modules = dict[str, Any](), dict[str, Any](), [], []
        for index, data in (("FILE", "BNDL"), ("TENS", "RESD")):
            end = self.sections[data].offset if data in self.sections else 0
            for at, fields in self.index(index, "IH2s" + RECORD if index == "FILE" else TENSOR + RECORD):
                if index == "FILE":
                    name, zero = self.name(at, *fields[:2]), fields[2]
                    check(
                        at,
                        file_name=BARE.fullmatch(name),
                        name_duplicate=name.lower() not in map(str.lower, self.files),
                    )
                    self.files[name] = r = self.record(at, fields[3:], align(end), None, None, zero)
                else:
                    tensor, raw = self.tensor(at, fields[:18], 0, self.tensors, False)
                    r = self.record(at, fields[18:], align(end), raw)
                    self.tensors[tensor.name] = tensor, r
                end = r.offset + r.stored
            check(end, record_range=data not in self.sections or end == self.sections[data].end)
        if s := self.sections.get("LAYT"):
            count, total = struct.unpack_from("<II", self.data, s.offset)
            start, taken = s.offset + 8 + 16 * count, 0
            for at, (first, number, raw) in self.rows(s.offset + 8, start, "IIQ"):
                check(at, layout_range=first == taken and first + number <= total, layout_empty=number)
                names, top, end = dict[str, Any](), (0, False), 0
                for place, fields in self.rows(start + 96 * first, start + 96 * (first + number), TENSOR):
                    tensor, end = self.tensor(place, fields, end, names, True)
                    module, _, rest = tensor.name.partition(".")
                    rank = (RANKS[module], rest != "weight") if module in RANKS else top
                    check(place, layout_order=rank >= top)
                    names[tensor.name], top = tensor, rank
                check(at, layout_raw_size=raw == end)
                self.layouts.append((raw, names))
                taken += number
            check(s.offset, layout_range=taken == total)
        paths, first, last = set(), 0, -1
        for at, (layer, count, offset, length, zero) in self.index("MOEL", "IIIH2s"):
            path = self.name(at, offset, length)
            check(
                at,
                name_duplicate=path not in paths,
                index_reserved=not any(zero),
                moe_layer_unsorted=layer > last,
                moe_layer_experts=count,
            )
            self.modules.append(Module(layer, count, path, first))
            paths.add(path)
            first, last = first + count, layer
        for name in [*self.tensors, *(m.path for m in self.modules)]:
            check(
                self.sections["STRS"].offset,
                name_inside_experts=not any(name[: dot.start()] in paths for dot in re.finditer(r"\.", name)),
            )
        check(self.sections["STRS"].offset, name_fill=self.names_end == self.sections["STRS"].stored)

    def experts(self) -> None:
        """Check EXPI and the content flags."""
        counts, last, s = {m.layer: m.count for m in self.modules}, (-1, -1), self.sections.get("EXPI")
        form = "II" + RECORD
        for i, (at, (layer, expert, *_)) in enumerate(self.index("EXPI", form)):
            key = layer, expert
            check(
                at,
                expert_layer=layer in counts,
                expert_range=expert < counts.get(layer, 0),
                expert_duplicate=key > last or key not in (x[:2] for _, x in islice(self.index("EXPI", form), i)),
                expert_unsorted=key > last,
            )
            last = key
        end = self.sections["SHRD"].offset if s else 0
        check(s.offset if s else 0, expert_missing=not s or s.stored // 48 == sum(counts.values()))
        for at, (_, _, *fields) in self.index("EXPI", form):
            known = fields[4] < len(self.layouts)
            r = self.record(at, fields, end, self.layouts[fields[4]][0] if known else None, known)
            end = align(r.offset + r.stored, self.align)
        check(end, record_range=not s or end == self.sections["SHRD"].end)
        kinds = {(t.mode, t.bits) for t, _ in self.tensors.values()}
        kinds |= {(t.mode, t.bits) for _, layout in self.layouts for t in layout.values()}
        bits = ["ASTC" in self.sections, False] + [(1, n) in kinds for n in (4, 3, 2)]
        bits += [name in self.sections for name in ("SPRS", "ANEC", "DRFT")] + [(2, 4) in kinds]
        check(64, content_flags=self.flags == sum(bit << i for i, bit in enumerate(bits)))

    def expert(self, i: int) -> Any:
        """Return the i-th record of EXPI."""
        return Record(*struct.unpack_from("<" + RECORD, self.data, self.sections["EXPI"].offset + 48 * i + 8))

    def decode(self, r: Any) -> Any:
        """Return the decoded bytes of a record or an ancillary section, None where zstd is missing."""
        data = self.data[r.offset : r.offset + r.stored]
        raw = unzstd(data, r.offset, r.raw) if r.codec else data
        self.skipped |= raw is None
        return raw

    def payload(self, r: Any, tensors: Any) -> Any:
        """Check a record and its tensors (15); return the decoded bytes."""
        check(r.offset, record_digest=xxh64(self.data[r.offset : r.offset + r.stored]) == r.digest)
        raw, end = self.decode(r), 0
        for offset, size in (part for t in tensors for part in t.parts if raw and part[1]):
            check(r.offset + end, padding_nonzero=not any(raw[end:offset]))
            end = offset + size
        for t in tensors if raw else ():
            parts, tops = [raw[offset : offset + size] for offset, size in t.parts], []
            form, mask = ("<I", 0x7FFFFFFF) if t.dtype == 1 else ("<H", 0x7FFF)
            for part, code in ((1, "scale-not-finite"), (2, "bias-not-finite")) if t.mode == 1 else ():
                top = max(word & mask for (word,) in struct.iter_unpack(form, parts[part]))
                check(r.offset, **{code: top < INFINITY[t.dtype]})
                tops.append(numbers(struct.pack(form, top), t.dtype)[0])
            if t.mode == 1:
                (largest,) = numbers(struct.pack(form, INFINITY[t.dtype] - 1), t.dtype)
                check(r.offset, value_overflow=tops[0] * ((1 << t.bits) - 1) + tops[1] <= largest)
            elif t.mode:
                rules = {code: not any(x in parts[part] for x in wrong) for part, code, wrong in NANS[t.mode]}
                check(r.offset, **rules, value_overflow=max(parts[1]) <= TOP_SCALE[t.mode][t.dtype])
        return raw

    def deep(self) -> None:
        """Check payload and appendices."""
        end, experts = self.head_size, (self.expert(i) for i in range(sum(m.count for m in self.modules)))
        for r, tensors in (*((r, ()) for r in self.files.values()), *((r, (t,)) for t, r in self.tensors.values())):
            check(end, padding_nonzero=not any(self.data[end : r.offset]))
            self.payload(r, tensors)
            end = r.offset + r.stored
        for r in experts:
            check(end, padding_nonzero=not any(self.data[end : r.offset]))
            self.payload(r, self.layouts[r.layout][1].values())
            end = r.offset + r.stored
        if "SHRD" in self.sections:
            check(end, padding_nonzero=not any(self.data[end : self.sections["SHRD"].end]))
            end = self.sections["SHRD"].end
        for s in self.sections.values():
            if s.name not in ORDER:
                end = self.covered(s, end)
                raw = self.decode(s)
                if raw and APPENDICES.get(s.name):
                    self.appendix(APPENDICES[s.name], self.lines(raw, s.offset), s.offset)
        check(256, draft_tensors="DRFT" in self.sections or all(t.role != 9 for t, _ in self.tensors.values()))

    def lines(self, raw: Any, at: int) -> Iterator[Any]:
        """Return the documents of an appendix."""
        start = 0
        while start < len(raw):
            stop = next((i for i in range(start, min(start + (1 << 21) + 1, len(raw))) if raw[i] == 10), -1)
            check(at, appendix_line=stop >= 0)
            yield document(raw[start:stop], at)
            start = stop + 1

    def appendix(self, kind: str, lines: Iterator[Any], at: int) -> None:
        """Check the lines of a profile, sparsity or draft head (17)."""
        head, config = next(lines), self.metadata["model"]["config"]
        check(at, appendix_header=fits(head, {"appendix": "string", "version": "count"}) and head["appendix"] == kind)
        modules, ours = iter(self.modules), head["version"] == 1
        check(at, **{kind + "_type": not ours or fits(head, HEADERS[kind])})
        if ours and kind == "draft":
            layers, tensors = head["source_layers"], [(t.name, r) for t, r in self.tensors.values() if t.role == 9]
            hidden, most = (config.get(key) for key in ("hidden_size", "num_hidden_layers"))
            check(
                at,
                draft_hidden=type(hidden) is not int or hidden == head["hidden"],
                draft_source_layer=layers
                and layers[0] >= 0
                and all(a < b for a, b in pairwise(layers))
                and (type(most) is not int or layers[-1] < most),
                draft_tensors=[x["name"] for x in head["tensors"]] == [name for name, _ in tensors],
                draft_digest=all(
                    x["digest"] == f"{r.digest:016x}" for x, (_, r) in zip(head["tensors"], tensors, strict=False)
                ),
            )
        for line in lines:
            if not ours:
                continue
            m: Any = next(modules, None)
            check(at, **{kind + "_layers": kind == "draft" or m})
            check(at, **{kind + "_type": kind in LINES and fits(line, LINES[kind])})
            values = line["counts" if kind == "profile" else "experts"]
            check(
                at,
                **{
                    kind + "_layers": line["layer"] == m.layer
                    and len(values) == m.count
                    and len(line.get("gate_mass", values)) == m.count
                },
            )
            if kind == "profile":
                pairs = line.get("coactivation", [])
                check(
                    at,
                    profile_count=all(0 <= n <= head["tokens"] for n in values),
                    profile_mass=all(x >= 0 and (n or not x) for n, x in zip(values, line["gate_mass"], strict=False)),
                    profile_coactivation=all(a[:2] < b[:2] for a, b in pairwise(pairs))
                    and all(0 <= a < b < m.count and 1 <= n <= min(values[a], values[b]) for a, b, n in pairs),
                )
                continue
            width, records = line["width"], [self.expert(m.first + i) for i in range(m.count)]
            for e, r in zip(values, records, strict=False):
                edges, bars, c = e["boundaries"], e["histogram"], e["clusters"]
                ups = [t for t in self.layouts[r.layout][1].values() if t.name in ("up_proj.weight", "fc1.weight")]
                check(
                    at,
                    sparsity_width=all(t.shape[0] == width for t in ups),
                    sparsity_clusters=1 <= c <= width,
                    sparsity_boundaries=len(edges) == c + 1
                    and edges[:1] == [0]
                    and edges[-1] == width
                    and all(a < b for a, b in pairwise(edges)),
                    sparsity_histogram=len(bars) == c and all(0 <= x <= 1 for x in bars),
                    sparsity_digest=e["digest"] == f"{r.digest:016x}",
                )
        check(at, **{kind + "_layers": not ours or kind == "draft" or next(modules, None) is None})


def show(f: File) -> None:
    """Print what is in a file."""
    for s in f.sections.values():
        print(f"section {s.name} offset={s.offset} stored={s.stored} raw={s.raw} codec={s.codec}")
    for t, r in f.tensors.values():
        print(
            f"tensor {t.name!a} {MODES[t.mode]} {DTYPES[t.dtype]} bits={t.bits} group={t.group} shape={t.shape} "
            f"offset={r.offset} stored={r.stored}"
        )
    for m in f.modules:
        print(f"layer {m.layer} experts={m.count} path={m.path!a}")
        for x in range(m.count):
            r = f.expert(m.first + x)
            print(f"expert {m.layer} {x} layout={r.layout} offset={r.offset} stored={r.stored} raw={r.raw}")
    for name, r in f.files.items():
        print(f"file {name} offset={r.offset} stored={r.stored} raw={r.raw}")


def values(f: File, r: Any, tensors: Any) -> None:
    """Print shape and values of the tensors in a record."""
    raw = f.payload(r, tensors)
    if raw is None:
        raise OSError("the record needs zstd, which Python has from 3.14")
    for t in tensors:
        print(f"{t.name!a} {t.shape}")
        for value in dequantize(raw, t):
            print(value if isinstance(value, int) else value.hex())


def run(command: str, path: str, *rest: str) -> int:
    """Carry out a command for a file; return the exit code."""
    try:
        f = File(path)
        if command == "verify":
            f.deep()
            print(f"{path}: valid" + " (zstd records skipped)" * f.skipped)
        elif f.metadata.get("set", {"count": 1})["count"] > 1:
            print("note: one file of a set, the others are not read", file=sys.stderr)
        if command == "list":
            show(f)
        elif command == "tensor":
            if rest[0] not in f.tensors:
                raise OSError("no such tensor")
            values(f, f.tensors[rest[0]][1], [f.tensors[rest[0]][0]])
        elif command == "expert":
            m = [m for m in f.modules if str(m.layer) == rest[0]]
            if not m or not re.fullmatch("[0-9]{1,10}", rest[1]) or int(rest[1]) >= m[0].count:
                raise OSError("no such expert")
            r = f.expert(m[0].first + int(rest[1]))
            values(f, r, list(f.layouts[r.layout][1].values()))
        sys.stdout.flush()
    except Bad as bad:
        print(f"{path}: invalid", *bad.args, file=sys.stdout if command == "verify" else sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError as error:
        print(f"{path}: cannot read: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    command, *arguments = sys.argv[1:] or [""]
    if command == "verify" and arguments:
        sys.exit(max(run(command, path) for path in arguments))
    if (command, len(arguments)) in (("list", 1), ("tensor", 2), ("expert", 3)):
        sys.exit(run(command, *arguments))
    print(__doc__, file=sys.stderr)
    sys.exit(2)
