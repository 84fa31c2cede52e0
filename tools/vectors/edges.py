"""What a plausible misreading of the spec gets wrong: each file is one that such a reader accepts, or calls otherwise.

Nearly all are made from the smallest valid files. What a misreading rejects wrongly is in the valid files `limits`,
`frame-limits`, `line-limits`, `extremes` and `largest-alignment`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from . import valid, zstd
from .build import Appendix, Coded, Draft, Spec, raw_record
from .invalid import FAULTS, DraftChange, Fault, SpecChange, frame, header, meta, spec
from .more import record, rewritten, row, section, twice
from .tensors import affine, encode_float, microscaling, raw
from .valid import joined, lines, metadata, reaching, rows_of, text

_LEAST = text(metadata())
_ID = "0" * 64


def _data(name: str, change: str, function: Callable[[bytes], bytes]) -> None:
    FAULTS[name] = Fault("least", change, data=function)


# -- signature and header --------------------------------------------------------------------------------------

_data("bad-magic.one-byte", "the file is the byte 58", lambda b: b"X")
_data("file-short.two-bytes", "cut after 2 bytes", lambda b: b[:2])
_data("file-short.and-text-mode", "cut after 200 bytes, without 0D", lambda b: b[:4] + b[5:200])
_data("version-future.and-digest", "major is 2, under the old digest", lambda b: b[:8] + b"\2" + b[9:])
for _more, _value in (("32", 32), ("2-25", 1 << 25), ("zero", 0)):
    header(f"record-alignment.{_more}", "record_alignment", _value)
header("head-limit.file-size", "head_size", 1 << 20)
header("section-count.zero", "directory_count", 0)
header("unknown-required-feature.bit-63", "required_features", 1 << 63)
header("content-flags.bit-31", "content_flags", 1 << 31)

# -- directory -------------------------------------------------------------------------------------------------


def _appended(kind: str, content: bytes, coded: Coded | None = None) -> SpecChange:
    return lambda s: s.appendices.append(Appendix(kind, content, coded))


for _more, _members in (("ancillary", ("stored_size", "raw_size")), ("decoded", ("raw_size",))):
    FAULTS[f"section-limit.{_more}"] = Fault(
        "least", f"a section of unknown type claims 2^36 + 1 bytes as {' and '.join(_members)}",
        spec=_appended("xtra", b"hello", Coded(zstd.frame(b"hello")) if _more == "decoded" else None),
        draft=section("xtra", **dict.fromkeys(_members, (1 << 36) + 1)),
    )  # fmt: skip
twice("section-limit.names", "STRS claims 2^21 + 1 bytes", section("STRS", **dict.fromkeys(
    ("stored_size", "raw_size"), (1 << 21) + 1)), base="least")  # fmt: skip
twice(
    "section-range.no-limit", "RESD claims 2^36 + 1 bytes, which no limit forbids",
    section("RESD", stored_size=(1 << 36) + 1, raw_size=(1 << 36) + 1), base="least",
)  # fmt: skip
twice(
    "section-empty.and-size", "STRS claims no stored byte", section("STRS", stored_size=0), base="least"
)  # fmt: skip


FAULTS["section-reserved.and-duplicate"] = Fault(
    "least", "xtra twice, the second with a reserved byte",
    spec=lambda s: s.appendices.extend(Appendix("xtra", b"more") for _ in range(2)),
    draft=lambda d: d.directory[-1].update(reserved0=b"\1"),
)  # fmt: skip
FAULTS["section-order.unknown"] = Fault(
    "least", "a section of unknown type between TENS and RESD",
    spec=lambda s: s.appendices.append(Appendix("xtra", b"more")),
    draft=lambda d: (
        d.directory[3].update(type=b"xtra", flags=0, digest=None),
        d.directory[4].update(type=b"RESD", flags=1, digest=0),
    ),
)  # fmt: skip
twice(
    "section-gap.and-range", "RESD starts 64 bytes later, and ends behind the file",
    lambda d: d.section("RESD").update(offset=d.section("RESD")["offset"] + 64), base="least",
)  # fmt: skip

# -- restricted JSON -------------------------------------------------------------------------------------------


def _odd(name: str, change: str, value: bytes) -> None:
    """A document with one more member, whose value is at fault."""
    meta(name, change, _LEAST[:-1] + b',"x":' + value + b"}")


meta("json-utf8.byte-order-mark", "a byte order mark", b"\xef\xbb\xbf" + _LEAST)
_odd("json-utf8.surrogate", "a surrogate as three bytes", b'"\xed\xa0\x80"')
_odd("json-utf8.overlong", "U+0000 as two bytes", b'"\xc0\x80"')
_odd("json-utf8.and-depth", "33 open brackets, a byte FF", b"[" * 32 + b"\xff")
_odd("json-depth.and-syntax", "33 brackets that are not closed", b"[" * 32)
_odd("json-depth.backslash-outside", "a quotation mark after a backslash, outside strings", b'\\"' + b"[" * 40 + b'"')
_odd("json-depth.in-no-string", "a string of a backslash, then brackets", b'"\\\\"' + b"[" * 40 + b'""')
_odd("json-syntax.below-zero", "five brackets closed, 36 opened", b"]" * 6 + b"[" * 37)
for _more, _value in {
    "form-feed": b"\x0c1", "vertical-tab": b"\x0b1", "no-break-space": b"\xc2\xa01", "leading-zero": b"01",
    "plus": b"+1", "point": b"1.", "no-digit": b".5", "minus": b"-", "nan": b"NaN", "infinity": b"-Infinity",
    "tab": b'"\t"', "byte-00": b'"\0"', "escape": b'"\\v"', "short-escape": b'"\\u000"', "comment": b"1/**/",
    "capital": b"True", "digits": "\u0661".encode(),
}.items():  # fmt: skip
    _odd(f"json-syntax.{_more}", f"the value {_value!r}", _value)
meta("json-syntax.two-values", "two documents", _LEAST + b" {}")
meta("json-syntax.byte-behind", "a byte 00 behind the document", _LEAST + b"\0")
_odd("json-number.negative", "-2^53", b"-9007199254740992")
_odd("json-number.many-digits", "an integer of 4,400 digits", b"9" * 4400)
_odd("json-number.infinite", "1e400", b"1e400")
_odd("json-number.rounds-up", "a number that rounds to 2^1024", b"1.7976931348623159e308")
_odd("json-number.and-duplicate", "2^53 between equal keys", b'{"a":1,"b":9007199254740992,"a":2}')
_odd("json-duplicate-key.and-string", "two keys that are the same half of a pair", b'{"\\ud83d":1,"\\uD83D":2}')
_odd("json-duplicate-key.pair", "a key as such and as escapes", '{"\U0001f600":1,"\\ud83d\\ude00":2}'.encode())
_odd("json-duplicate-key.empty", "two empty keys", b'{"":1,"":2}')
_odd("json-string.two-keys", "different halves of pairs as keys", b'{"\\ud83d":1,"\\ud83e":2}')
_odd("json-string.zero", "U+0000 in a string", b'"\\u0000"')
_odd("json-string.key", "U+0000 in a key", b'{"\\u0000":1}')
_odd("json-string.low-first", "the halves of a pair in the wrong order", b'"\\ude00\\ud83d"')
_odd("json-string.apart", "the halves of a pair with a letter between", b'"\\ud83dx\\ude00"')

# -- metadata --------------------------------------------------------------------------------------------------


def _says(name: str, change: str, **members: Any) -> None:
    """Other metadata, as JSON."""
    meta(name, change, text(metadata(**members)))


def _sibling(name: str = "b", **members: Any) -> dict[str, Any]:
    return {"name": name, "size": 1, "file_id": _ID} | members


_PAIR = {"index": 0, "count": 2}
_FILE = {"name": "a", "size": 1, "sha256": _ID}
meta("metadata-type.array", "an array", b"[]")
_says("metadata-type.no-model-type", "no model_type", model={"config": {}})
_says("metadata-type.quantizer", "the quantizer is a number", recipe={"quantizer": 1})
_says("metadata-type.null", "the licence is null", licence=None)
_says("metadata-type.calibration", "a SHA-256 of 63 digits", provenance={"calibration": {"sha256": "0" * 63}})
_says("metadata-type.capitals", "a SHA-256 of capitals", provenance={"calibration": {"sha256": "A" * 64}})
_says("metadata-type.line-feed", "a SHA-256 and a line feed", provenance={"calibration": {"sha256": _ID + "\n"}})
for _more, _value in {
    "files": {}, "file": [1], "file-fraction": [_FILE | {"size": 1.5}], "file-negative": [_FILE | {"size": -1}],
    "file-hash": [{"name": "a", "size": 1}],
}.items():  # fmt: skip
    _says(f"metadata-type.source-{_more}", f"source.files is {_value}", provenance={"source": {"files": _value}})
_says("metadata-type.count-fraction", "a count of 1.0", set={"index": 0, "count": 1.0})
_says("metadata-type.index-boolean", "an index of false", set={"index": False, "count": 1})
_says("metadata-type.and-sibling-name", "a sibling's path, then a number", set=_PAIR, siblings=[_sibling("../a"), 1])
_says("metadata-set.of-equal-names", "siblings a and A", set=_PAIR | {"count": 3},
      siblings=[_sibling("a"), _sibling("A")])  # fmt: skip
_says("metadata-set.second-member", "member 1 with siblings", set={"index": 1, "count": 2}, siblings=[_sibling()])
_says("metadata-set.no-set", "siblings without set", siblings=[_sibling()])
_says("metadata-set.index", "index 1 of 1", set={"index": 1, "count": 1})
_says("metadata-set.of-none", "count 0", set={"index": 0, "count": 0})
_BARE = {
    "last-dot": "a.", "first-dash": "-a", "first-dot": ".a", "129": "a" * 129, "non-ascii": "caf\u00e9",
    "kelvin": "\u212a", "digit": "\u0661", "space": "a b", "backslash": "a\\b",
}  # fmt: skip
for _more, _value in (_BARE | {"line-feed": "a\n", "empty": ""}).items():
    _says(f"sibling-name.{_more}", f"the name {_value!r}", set=_PAIR, siblings=[_sibling(_value)])
for _more, _value in _BARE.items():
    spec(f"file-name.{_more}", "least", f"the name {_value!r}", lambda s, n=_value: s.files.append((n, b"x", None)))
spec("name-control.file", "least", "an embedded file a, line feed", lambda s: s.files.append(("a\n", b"x", None)))

# -- names -----------------------------------------------------------------------------------------------------


def _named(name: str, change: str, *names: str, base: str = "least") -> None:
    """Residents of one byte each, with these names."""
    spec(name, base, change, lambda s: setattr(s, "residents", [(_called(n), None) for n in names]))


def _called(name: str) -> valid.Tensor:
    """A tensor of one byte; the name may be none."""
    tensor = raw("x", "other", "u8", (1,), [1])
    tensor.name = name
    return tensor


def _modules(name: str, change: str, *paths: str) -> None:
    """Other paths of the two modules."""

    def function(s: Spec) -> None:
        s.layers = [(layer, path, some) for (layer, _, some), path in zip(s.layers, paths, strict=True)]

    spec(name, "small", change, function)


_named("name-control.c1", "U+0085 in a name", "a\u0085")
_named("name-control.delete", "U+007F in a name", "a\x7f")
_named("name-utf8.surrogate", "a surrogate in a name", "a\udced\udca0\udc80")
_named("name-utf8.overlong", "a slash as two bytes", "a\udcc0\udcaf")
FAULTS["name-inside-experts.between"] = Fault(
    "small", "the path is m0; tensors m0-b, m0.b and m0/b",
    spec=lambda s: s.residents.extend((_called(n), None) for n in ("m0-b", "m0.b", "m0/b")),
)  # fmt: skip
_modules("name-inside-experts.module", "a module inside another", "m", "m.a")
_modules("name-inside-experts.module-before", "a module inside a later one", "m.a.b", "m")
_modules("name-duplicate.module", "two modules of one path", "m", "m")
spec("name-duplicate.file-case", "least", "files a and A", lambda s: s.files.extend((n, b"x", None) for n in "aA"))
spec("name-duplicate.layout", "small", "two tensors of one name in a layout", lambda s: _rename(s, "a", "b", "a"))


def _parts(s: Spec, resident: str, path: str, *layout: str) -> None:
    """Names of which some are parts of earlier ones, and stored only there."""
    s.share_parts, s.residents[1][0].name, s.layers[1] = True, resident, (1, path, s.layers[1][2])
    _rename(s, *layout)


for _more, _names in {
    "resident": ("weight", "m1", "x", "y", "z"), "layout": ("n", "m1", "x", "weight", "z"),
    "module": ("n", "a.w", "x", "y", "z"),
}.items():  # fmt: skip
    spec(
        f"name-place.{_more}", "small", f"the names {', '.join(_names)}, one of them only inside a.weight",
        lambda s, n=_names: _parts(s, *n),
    )  # fmt: skip
twice(
    "name-place.shorter", "the start of the name before", row("TENS", 1, name_offset=1, name_length=1), base="small"
)  # fmt: skip
twice("name-length.zero", "a name of no bytes", row("TENS", 1, name_length=0), base="small")
twice("name-range.wraps", "a name at 2^32 - 1", row("TENS", 1, name_offset=2**32 - 1), base="small")
FAULTS["name-length.256-files"] = Fault(
    "least", "256 embedded files, as many as allowed; the first has no name",
    spec=lambda s: (s.files.append(("f", b"x", None)), s.extra.update(FILE=bytes(255 * 48))),
    draft=row("FILE", 0, name_length=0),
)  # fmt: skip

# -- index sizes -----------------------------------------------------------------------------------------------


def _without(name: str, change: str, counts: tuple[int, int], *layouts: tuple[int, int]) -> None:
    """LAYT of these counts and layouts, filled up with zero bytes to what the counts say."""
    size = 8 + 16 * counts[0] + 96 * counts[1]
    content = struct.pack("<II", *counts) + b"".join(struct.pack("<IIQ", *each, 0) for each in layouts)
    spec(name, "small", change, lambda s: s.replaced.update(LAYT=content + bytes(size - len(content))))


_without("index-count.layouts", "1,025 layouts", (1025, 0))
_without("layout-range.left-over", "a tensor that no layout has", (0, 1))
_without("layout-range.and-empty", "a layout of no tensors that starts at tensor 1", (1, 0), (1, 0))
_without("layout-range.wraps", "a layout of 2^32 - 1 tensors", (1, 0), (0, 2**32 - 1))
spec("record-layout.none", "small", "no layout, but experts", lambda s: s.layouts.clear())
spec("index-size.short", "small", "LAYT has 7 bytes FF", lambda s: s.replaced.update(LAYT=b"\xff" * 7))
spec("index-size.and-count", "small", "LAYT has 8 bytes FF", lambda s: s.replaced.update(LAYT=b"\xff" * 8))

# -- tensors and layouts ---------------------------------------------------------------------------------------


def _tensor(name: str, change: str, **members: int) -> None:
    """Other members of the affine tensor of `small`."""
    twice(name, change, row("TENS", 0, **members), base="small")


_tensor("tensor-role.unknown", "role 10", role=10)
twice("tensor-role.layout", "role 2 in LAYT", lambda d: d.head["LAYT"]["tensors"][0].update(role=2), base="small")
_tensor("tensor-dtype.and-encoding", "affine of dtype 12", dtype=12)
_tensor("tensor-dtype.zero", "dtype 0", dtype=0)
_tensor("tensor-encoding.integer", "affine of u8", dtype=4)
_tensor("tensor-encoding.group", "a group size of 16", group_size=16)
_tensor("tensor-encoding.7-bits", "7 bits", bits=7)
twice("tensor-encoding.raw", "raw of 8 bits", row("TENS", 1, bits=8), base="small")
_tensor("tensor-dims.zero", "no dimension", ndim=0)
_tensor("tensor-unused-dim.and-zero", "shape [0, 32, 0, 1]", shape0=0, shape3=1)
_tensor("tensor-overflow.and-row", "shape [2^48, 33]", shape0=1 << 48, shape1=33)
_tensor("tensor-overflow.wraps", "shape [2^32, 2^32]", shape0=1 << 32, shape1=1 << 32)
_tensor("part-offset.and-size", "codes at 64, scales of 4 bytes", codes_offset=64, scales_size=4)
_tensor("part-size.and-range", "scales of 4 bytes at 2^64 - 64", scales_size=4, scales_offset=2**64 - 64)


def _rename(s: Spec, *names: str) -> None:
    """Other names of the tensors of all layouts."""
    for some in [*s.layouts, *(e.tensors for _, _, experts in s.layers for e in experts)]:
        for tensor, name in zip(some, names, strict=True):
            tensor.name = name


for _more, _names in {
    "bias-first": ("gate_proj.bias", "gate_proj.weight", "z"),
    "first-dot": ("gate_proj.x.weight", "gate_proj.weight", "z"),
    "longer": ("gate_proj.weight.x", "gate_proj.weight", "z"),
    "fc": ("fc2.weight", "fc1.weight", "z"),
    "forms": ("fc2.weight", "gate_proj.weight", "z"),
    "other-module": ("gate_proj.bias", "fc1.weight", "z"),
    "between": ("up_proj.weight", "x.weight", "gate_proj.weight"),
    "no-dot": ("gate_proj", "gate_proj.weight", "z"),
    "no-dot-rank": ("up_proj", "z", "gate_proj"),
}.items():
    spec(f"layout-order.{_more}", "small", f"a layout of {', '.join(_names)}", lambda s, n=_names: _rename(s, *n))

# -- records ---------------------------------------------------------------------------------------------------


def _record(name: str, change: str, kind: str = "FILE", **members: int) -> None:
    """Other members of the first record."""
    twice(name, change, record(kind, 0, **members), base="small")


_record("record-codec.and-limit", "codec 2, a raw_size of 2^36 + 1", codec=2, raw_size=(1 << 36) + 1)
_record("record-limit.and-empty", "a stored_size of 0, a raw_size of 2^40", stored_size=0, raw_size=1 << 40)
_record("record-limit.decoded", "zstd, a raw_size of 2^36 + 1", codec=1, raw_size=(1 << 36) + 1)
_record("record-empty.and-size", "a stored_size of 0, a raw_size of 1", stored_size=0)
_record("record-empty.decoded", "zstd, a raw_size of 0", codec=1, raw_size=0)
_record("record-ratio.and-layout", "zstd, a raw_size of 65, layout 1", codec=1, raw_size=65, layout=1)
_record("record-ratio.one-more", "zstd, 65 bytes from one", codec=1, raw_size=65)
_record("record-layout.file", "layout 1 in FILE", layout=1)
_record("record-layout.resident", "layout 1 in TENS", "TENS", layout=1)
_record("record-layout.and-reserved", "layout 1, a reserved byte", "EXPI", layout=1, reserved=1)
twice("record-codec.and-reserved", "FILE: a reserved byte, codec 2", row("FILE", 0, reserved=1),
      record("FILE", 0, codec=2), base="small")  # fmt: skip


def _longer(kind: str) -> DraftChange:
    """A data section, with what follows it, 64 bytes longer; only its directory entry says so."""

    def change(d: Draft) -> None:
        found = False
        for s in d.directory:
            s["offset"] += 64 * found
            if s["type"] == kind.encode():
                found = True
                s.update(stored_size=s["stored_size"] + 64, raw_size=s["raw_size"] + 64)
        d.size += 64
        d.header["file_size"] += 64

    return change


twice("record-range.files", "64 zero bytes at the end of BNDL", _longer("BNDL"), base="small")
twice("record-range.experts", "64 zero bytes at the end of SHRD", _longer("SHRD"), base="small")
twice("expert-unsorted.layers", "the expert of the second module is the first",
      lambda d: d.head["EXPI"].insert(0, d.head["EXPI"].pop()), base="small")  # fmt: skip

# -- payload ---------------------------------------------------------------------------------------------------


def _dirty(place: Callable[[Draft], int]) -> DraftChange:
    """A byte 01 where there should be none."""
    return lambda d: d.data.update({place(d): b"\1"})


def _ends(d: Draft, kind: str) -> int:
    return int(d.section(kind)["offset"] + d.section(kind)["stored_size"])


twice("padding-nonzero.last", "the last byte of SHRD is 01", _dirty(lambda d: _ends(d, "SHRD") - 1), base="small",
      deep=True)  # fmt: skip
twice("padding-nonzero.head-end", "the byte behind the head is 01", _dirty(lambda d: d.header["head_size"]),
      base="small", deep=True)  # fmt: skip
twice("padding-nonzero.data-sections", "the last byte before SHRD is 01",
      _dirty(lambda d: d.section("SHRD")["offset"] - 1), base="small", deep=True)  # fmt: skip
twice("padding-nonzero.appendix", "the last byte before DRFT is 01", _dirty(lambda d: d.section("DRFT")["offset"] - 1),
      base="notes", deep=True)  # fmt: skip


def _in_record(kind: str, place: int, at: int) -> DraftChange:
    """A byte 01 inside a record, under its digest."""

    def change(d: Draft) -> None:
        start = d.head[kind][place]["record"]["offset"]
        d.data[start] = d.data[start][:at] + b"\1" + d.data[start][at + 1 :]

    return change


twice("padding-nonzero.expert", "byte 100 of the first expert's record is 01", _in_record("EXPI", 0, 100),
      base="small", deep=True)  # fmt: skip
FAULTS["padding-nonzero.and-values"] = Fault(
    "small", "the scale is infinite, byte 100 of the record is 01",
    spec=lambda s: setattr(s.residents[0][0], "scales", b"\0\x7c"), draft=_in_record("TENS", 0, 100), deep=True,
)  # fmt: skip

# -- values ----------------------------------------------------------------------------------------------------


def _only(name: str, change: str, tensor: valid.Tensor) -> None:
    """A file of this tensor."""
    spec(name, "least", change, lambda s: setattr(s, "residents", [(tensor, None)]), True)


def _reach(more: str, change: str, *what: Any) -> None:
    _only(f"value-overflow.{more}", change, reaching("t", *what))


_reach("f32", "the largest f32 and 2^100", "f32", 2, 5592405 * 2.0**104, 2.0**100)
_reach("bf16", "above the largest bf16, below the largest f32", "bf16", 2, 85 * 2.0**120, 2.0**119)


def _two_groups() -> valid.Tensor:
    t = affine("t", "dense", 4, 32, "f16", (1, 64))
    t.scales = encode_float(4096.0, "f16") + encode_float(1.0, "f16")
    t.biases = encode_float(0.0, "f16") + encode_float(4096.0, "f16")
    return t


def _signs() -> valid.Tensor:
    t = affine("t", "dense", 4, 32, "f16", (1, 32))
    t.scales, t.biases = encode_float(-4096.0, "f16"), encode_float(4096.0, "f16")
    return t


_only("value-overflow.two-groups", "the largest scale and the largest bias in different groups", _two_groups())
_only("value-overflow.signs", "a negative scale, a positive bias", _signs())
for _mode, _most in (("mxfp4", (252, 140, 252)), ("mxfp8", (246, 134, 246))):
    for _dtype, _top in zip(("f32", "f16", "bf16"), _most, strict=True):
        _t = microscaling("t", "dense", _mode, _dtype, (1, 32), [127])
        _t.scales = bytes([_top + 1])
        _only(f"value-overflow.{_mode}-{_dtype}", f"{_mode} of {_dtype}: a scale of {_top + 1}", _t)


def _nans(mode: str, scale: int, code: int) -> valid.Tensor:
    t = microscaling("t", "dense", mode, "bf16", (1, 32))
    t.scales, t.codes = bytes([scale]) * len(t.scales), bytes([code]) + t.codes[1:]
    return t


_only("e8m0-nan.and-e4m3", "mxfp8: the scale is FF, a code is 7F", _nans("mxfp8", 255, 127))
_only("e4m3-nan.7f", "mxfp8: a code is 7F", _nans("mxfp8", 127, 127))
_only("e4m3-nan.scale", "nvfp4: the scales are FF", _nans("nvfp4", 255, 0))
_only("e4m3-nan.scale-7f", "nvfp4: the scales are 7F", _nans("nvfp4", 127, 0))

# -- frames ----------------------------------------------------------------------------------------------------

_PLAIN = raw_record([valid.MAKERS["framed"]().residents[0][0]])  # 160 bytes
_BLOCKS, _SUM = zstd.blocks(_PLAIN), zstd.checksum(_PLAIN)
_HEADER = zstd.header(160)
frame("zstd-skippable.5f", "a skippable frame of the last magic number", b"\x5f\x2a\x4d\x18\0\0\0\0" + _HEADER)
frame("zstd-magic.three-bytes", "three bytes of the magic number", zstd.MAGIC[:3])
frame("zstd-header.four-bytes", "the magic number and nothing else", zstd.MAGIC)
frame("zstd-header.cut", "a content size of which a byte is missing", zstd.header(160, width=4)[:-1])
frame("zstd-header.unused", "the unused bit is set", zstd.header(160, flags=16) + _BLOCKS + _SUM)
frame("zstd-size-absent.and-dictionary", "no content size, a dictionary",
      zstd.header(None, window=0, flags=1) + b"\1" + _BLOCKS + _SUM)  # fmt: skip
frame("zstd-dictionary.and-checksum", "a dictionary, no checksum",
      zstd.header(160, has_checksum=False, flags=1)[:5] + b"\1\xa0" + _BLOCKS)  # fmt: skip
frame("zstd-block.window", "161 raw bytes in a window of 160",
      _HEADER + zstd.block(0, 161, _PLAIN + b"x", True) + _SUM)  # fmt: skip
frame("zstd-block.rle", "161 times a byte in a window of 160", _HEADER + zstd.block(1, 161, b"x", True) + _SUM)
frame("zstd-block.and-blocks", "the first block that is too many has type 3",
      _HEADER + zstd.block(0, 0, b"", False) * 17 + zstd.block(3, 0, b"", True) + _SUM)  # fmt: skip
frame("zstd-blocks.one-more", "20 blocks in 238 bytes", _HEADER + zstd.block(0, 0, b"", False) * 19 + _BLOCKS + _SUM)
frame("zstd-blocks.and-truncated", "20 empty blocks, none the last", _HEADER + zstd.block(0, 0, b"", False) * 20)
frame("zstd-truncated.checksum", "two bytes of the checksum", _HEADER + _BLOCKS + _SUM[:2])
frame("zstd-truncated.block-header", "two bytes of a block's header", _HEADER + zstd.block(0, 0, b"", False) + b"\1\0")
frame("zstd-corrupt.too-many", "blocks of 161 bytes",
      _HEADER + zstd.block(0, 160, _PLAIN, False) + zstd.block(0, 1, b"x", True)
      + zstd.checksum(_PLAIN + b"x"))  # fmt: skip
frame("zstd-corrupt.and-checksum", "blocks of 159 bytes, a wrong checksum",
      _HEADER + zstd.blocks(_PLAIN[:159]) + b"\0\0\0\0")  # fmt: skip
frame("zstd-corrupt.no-table", "literals that need the table of a block before",
      _HEADER + zstd.block(0, 155, _PLAIN[:155], False) + zstd.block(2, 5, b"\x53\x40\0\1\0", True)
      + _SUM)  # fmt: skip
frame("zstd-corrupt.before-start", "a match that starts before the content",
      _HEADER + zstd.block(0, 5, _PLAIN[:5], False) + zstd.block(2, 7, b"\0\1\x54\0\1\0\2", False)
      + zstd.block(0, 152, _PLAIN[8:], True) + _SUM)  # fmt: skip


FAULTS["zstd-magic.unknown-section"] = Fault(
    "least", "a section of unknown type is no frame", spec=_appended("xtra", b"hello", Coded(b"hello")), deep=True
)
FAULTS["zstd-checksum.opaque"] = Fault(
    "least", "the frame of ASTC has another checksum", deep=True,
    spec=_appended("ASTC", b"hello", Coded(zstd.frame(b"hello")[:-4] + b"\0\0\0\0")),
)  # fmt: skip
FAULTS["section-digest.unknown"] = Fault(
    "least", "the digest of a section of unknown type is wrong", spec=_appended("xtra", b"hello"),
    draft=section("xtra", digest=1), deep=True,
)  # fmt: skip

# -- lines -----------------------------------------------------------------------------------------------------


def _lines(name: str, change: str, content: bytes, coded: Coded | None = None) -> None:
    """A file with this profile."""
    FAULTS[name] = Fault("least", f"PROF: {change}", spec=_appended("PROF", content, coded), deep=True)


_NEW = lines({"appendix": "profile", "version": 2})
_lines("appendix-header.and-version", "another name, another version", lines({"appendix": "draft", "version": 2}))
_lines("appendix-header.fraction", "version 1.0", lines({"appendix": "profile", "version": 1.0}))
_lines("appendix-header.number", "the first line is a number", b"1\n")
_lines("appendix-line.and-utf8", "a last line of FF without 0A", _NEW + b"\xff")
_lines("appendix-line.empty", "a last line of a blank without 0A", _NEW + b" ")
_lines("json-syntax.empty-line", "an empty line", _NEW + b"\n")
_lines("json-syntax.other-version", "a line that is no JSON, in another version", _NEW + b"{]\n")
_lines("json-utf8.second-line", "a byte order mark before the second line", _NEW + b"\xef\xbb\xbf1\n")
_lines("json-duplicate-key.line", "equal keys in a line of another version", _NEW + b'{"a":1,"a":1}\n')
_LONG = _NEW + b'"' + b"y" * 33400 + b'"\n"' + b"x" * ((1 << 21) - 1) + b'"\n'
_lines(
    "appendix-line.one-more", "a line of 2^21 + 1 bytes, in a frame", _LONG,
    joined(_LONG, (0, len(_LONG) - (1 << 21) - 1, _LONG[: -(1 << 21) - 1]), *[(1, 1 << 17, b"x")] * 15,
           (1, (1 << 17) - 1, b"x"), (0, 2, b'"\n')),
)  # fmt: skip
_DEEP = _NEW + b"[" * 2200 + b"," * (1 << 17) + b"\n"
_lines(
    "json-tokens.and-depth", "2,200 brackets and 2^17 commas in a line, in a frame", _DEEP,
    joined(_DEEP, (0, len(_DEEP) - (1 << 17) - 1, _DEEP[: -(1 << 17) - 1]), (1, 1 << 17, b","), (0, 1, b"\n")),
)  # fmt: skip

# -- profile, sparsity, draft head -----------------------------------------------------------------------------


def _profile(name: str, change: str, **members: Any) -> None:
    """Other members of the line of the first module: three experts, counts 9, 4 and 0 of 9 tokens."""
    rewritten(name, "PROF", change, lambda some: [some[0], some[1] | members, some[2]], "notes")


def _cluster(name: str, change: str, **members: Any) -> None:
    """Other members of the second expert of the first module: one cluster, width 2."""

    def function(some: list[dict]) -> list:
        some[1]["experts"][1] |= members
        return some

    rewritten(name, "SPRS", change, function, "notes")


def _draft(name: str, change: str, **members: Any) -> None:
    """Other members of the draft head."""
    rewritten(name, "DRFT", change, lambda some: [some[0] | members], "notes")


_profile("profile-count.tokens", "a count above tokens", counts=[10, 4, 0])
_profile("profile-mass.without-count", "gate mass where the count is 0", gate_mass=[1.5, 4, 0.5])
for _more, _value in {
    "order": [[0, 1, 1], [0, 1, 1]], "descending": [[1, 0, 1]], "itself": [[0, 0, 1]], "nobody": [[0, 1, 0]],
    "expert": [[0, 3, 1]], "negative": [[-1, 1, 1]],
}.items():  # fmt: skip
    _profile(f"profile-coactivation.{_more}", f"coactivation is {_value}", coactivation=_value)
_profile("profile-type.four", "a pair of four numbers", coactivation=[[0, 1, 1, 1]])
_profile("profile-type.and-layers", "layer 5, a count of 1.5", layer=5, counts=[1.5, 4, 0])
_profile("profile-layers.layer", "layer 5", layer=5)
_profile("profile-layers.mass", "two gate masses", gate_mass=[1.5, 4])
rewritten("profile-layers.missing", "PROF", "a line is missing", lambda some: some[:2], "notes")
_cluster("sparsity-clusters.width", "three clusters, a width of 2", clusters=3, boundaries=[0, 1, 2, 3])
_cluster("sparsity-boundaries.end", "the last boundary is 1", boundaries=[0, 1])
_cluster("sparsity-boundaries.length", "three boundaries of one cluster", boundaries=[0, 1, 2])
_cluster("sparsity-histogram.length", "two fractions of one cluster", histogram=[0, 0])
_cluster("sparsity-type.digest", "a digest of capitals", digest="A" * 16)
_cluster("sparsity-type.predictor", "a predictor without kind", predictor={})


def _second_expert(s: Spec) -> None:
    """The second expert of the first module gets the layout of the second module."""
    expert = s.layers[0][2][1]
    expert.layout, expert.tensors = 1, rows_of(3, 1)
    next(a for a in s.appendices if a.type == "SPRS").content = valid.clusters(s, 2, 3)


FAULTS["sparsity-width.second-expert"] = Fault(
    "notes", "SPRS: the second expert of the first module is wider", spec=_second_expert, deep=True
)
_draft("draft-hidden.kind", "kind medusa, another width", kind="medusa", hidden=5)
_draft("draft-source-layer.none", "no source layer", source_layers=[])
_draft("draft-source-layer.twice", "a source layer twice", source_layers=[1, 1])
_draft("draft-source-layer.negative", "source layer -1", source_layers=[-1, 1])


def _swapped(some: list[dict]) -> list:
    return [some[0] | {"tensors": some[0]["tensors"][::-1]}]


def _two_wrong(some: list[dict]) -> list:
    first, second = some[0]["tensors"]
    return [some[0] | {"tensors": [first | {"digest": "0" * 16}, second | {"name": "x"}]}]


rewritten("draft-tensors.order", "DRFT", "the tensors in another order", _swapped, "notes")
rewritten("draft-tensors.and-digest", "DRFT", "the first digest and the second name are wrong", _two_wrong, "notes")
FAULTS["draft-tensors.no-section"] = Fault(
    "least", "a tensor of role draft, but no DRFT", spec=lambda s: setattr(s.residents[0][0], "role", "draft"),
    deep=True,
)  # fmt: skip

for _name, _fault in FAULTS.items():  # what a reader without zstd does not find
    _coded = _name in ("appendix-line.one-more", "json-tokens.and-depth", "zstd-checksum.opaque")
    _fault.coded = _coded or _name.partition(".")[0] in ("zstd-corrupt", "zstd-checksum")
