"""The valid files: together they use every section, codec, mode, dtype and freedom of the format."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from . import zstd
from .build import Appendix, Coded, Expert, Spec, Tensor, raw_record
from .tensors import Stream, affine, encode_float, f32, microscaling, raw

FRAMES = Path(__file__).with_name("frames.json")
MAKERS: dict[str, Callable[[], Spec]] = {}
_frames: dict[str, dict[str, str]] = json.loads(FRAMES.read_text()) if FRAMES.exists() else {}


def vector(make: Callable[[], Spec]) -> Callable[[], Spec]:
    """Register a file under its function's name."""
    MAKERS[make.__name__.replace("_", "-")] = make
    return make


def text(value: Any) -> bytes:
    """Canonical restricted JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def metadata(**members: Any) -> dict[str, Any]:
    """The least that META must say, and whatever else."""
    return {"model": {"config": {"model_type": "toy"}}, "recipe": {}, "provenance": {}} | members


def compressed(key: str, content: bytes, window_log: int = 10) -> Coded:
    """A frame with compressed blocks from frames.json (made anew where its content changed)."""
    wanted = hashlib.sha256(content).hexdigest()
    if _frames.get(key, {}).get("sha256") != wanted:
        remake_frame(key, content, wanted, window_log)
    return Coded(bytes.fromhex(_frames[key]["frame"]))


def remake_frame(key: str, content: bytes, wanted: str, window_log: int) -> None:
    """Make a frame anew with the installed zstd; only where its content changed."""
    import zstandard

    parameters = zstandard.ZstdCompressionParameters.from_level(
        19, write_checksum=1, write_content_size=1, window_log=window_log
    )
    frame = zstandard.ZstdCompressor(compression_params=parameters).compress(content)
    _frames[key] = {"sha256": wanted, "frame": frame.hex()}
    FRAMES.write_text(json.dumps(_frames, indent=1, sort_keys=True) + "\n")


def coded(content: bytes, **options: Any) -> Coded:
    """A frame of raw and RLE blocks."""
    return Coded(zstd.frame(content, **options))


# -- experts ---------------------------------------------------------------------------------------------


def expert_tensors(seed: str, hidden: int = 32, width: int = 2) -> list[Tensor]:
    """Gate and up at 4 bits, down in f16."""
    return [
        affine("gate_proj.weight", "expert", 4, 32, "bf16", (width, hidden), seed),
        affine("up_proj.weight", "expert", 4, 32, "bf16", (width, hidden), seed),
        _reseeded(raw, "down_proj.weight", seed, "f16", (hidden, width)),
    ]


def _reseeded(make: Callable[..., Tensor], name: str, seed: str, *arguments: Any) -> Tensor:
    tensor = make(name + seed, "expert", *arguments)
    tensor.name = name
    return tensor


def moe_layer(layer: int, count: int, layout: int = 0) -> tuple[int, str, list[Expert]]:
    """A layer of like experts."""
    experts = [Expert(layout, expert_tensors(f" {layer} {i}")) for i in range(count)]
    return layer, f"model.layers.{layer}.mlp.switch_mlp", experts


# -- the files -------------------------------------------------------------------------------------------


@vector
def toy() -> Spec:
    """Two layers of four experts, an embedding, a norm and a tokenizer: the worked example of the spec."""
    return Spec(
        text(metadata(licence="CC0-1.0")),
        [
            (affine("model.embed_tokens.weight", "embedding", 8, 32, "f32", (2, 32)), None),
            (raw("model.norm.weight", "norm", "f32", (2,), [1.0, -0.5]), None),
        ],
        [("tokenizer.json", b"{}", None)],
        [expert_tensors("")],
        [moe_layer(0, 4), moe_layer(1, 4)],
    )


@vector
def dense() -> Spec:
    """No experts and no embedded files; every raw dtype, one to four dimensions, special values."""
    inf, nan = math.inf, math.nan
    residents = [
        raw("floats.f32", "other", "f32", (2, 4), [0.0, -0.0, inf, -inf, nan, 2.0**-149, f32(3.4028234e38), f32(0.1)]),
        raw("floats.f16", "attention", "f16", (8,), [0.0, -0.0, inf, -inf, nan, 2.0**-24, 65504.0, 0.0999755859375]),
        raw(
            "floats.bf16", "router", "bf16", (2, 2, 2), [0.0, -0.0, inf, -inf, nan, 2.0**-133, 2.0**127, 0.10009765625]
        ),
        raw("integers.u8", "shared", "u8", (3,), [0, 127, 255]),
        raw("integers.i8", "norm", "i8", (3,), [-128, -1, 127]),
        raw("integers.u16", "head", "u16", (2,), [1, 65535]),
        raw("integers.i16", "dense", "i16", (2,), [-32768, 32767]),
        raw("integers.u32", "embedding", "u32", (1, 2), [1, 2**32 - 1]),
        raw("integers.i32", "other", "i32", (2, 1), [-(2**31), 2**31 - 1]),
        raw("integers.u64", "other", "u64", (1, 1, 1, 2), [1, 2**64 - 1]),
        raw("integers.i64", "other", "i64", (2,), [-(2**63), 2**63 - 1]),
    ]
    return Spec(text(metadata()), [(t, None) for t in residents])


@vector
def all_affine() -> Spec:
    """Every registered (bits, group size, dtype) of affine, two groups a row."""
    residents = [
        affine(f"b{bits}.g{group}.{dtype}", "dense", bits, group, dtype, (2, 2 * group))
        for bits in (2, 3, 4, 5, 6, 8)
        for group in (32, 64, 128)
        for dtype in ("f32", "f16", "bf16")
    ]
    return Spec(text(metadata()), [(t, None) for t in residents])


@vector
def ramp() -> Spec:
    """w = i / 31 for i from 0 to 31 at every width: the codes are known in advance."""
    residents = []
    for bits in (2, 3, 4, 5, 6, 8):
        most = (1 << bits) - 1
        t = affine(f"ramp.{bits}", "dense", bits, 32, "f32", (1, 32))
        codes, scale = [math.floor(most - i / 31 * most + 0.5) for i in range(32)], f32(-1 / most)
        t.codes = sum(c << (i * bits) for i, c in enumerate(codes)).to_bytes(4 * bits, "little")
        t.scales, t.biases = _f32(scale), _f32(1.0)
        t.values = [f32(f32(scale * c) + 1.0) for c in codes]
        residents.append((t, None))
    return Spec(text(metadata()), residents)


def _f32(value: float) -> bytes:
    return struct.pack("<f", value)


@vector
def microscaling_modes() -> Spec:
    """mxfp4, mxfp8 and nvfp4, decoded into each float type; every code, and the extreme scales."""
    residents = []
    for dtype, largest4, largest8 in (("f32", 252, 246), ("f16", 140, 134), ("bf16", 252, 246)):
        residents += [
            microscaling(f"mxfp4.{dtype}", "dense", "mxfp4", dtype, (2, 64), [0, 1, 127, largest4]),
            microscaling(f"mxfp8.{dtype}", "dense", "mxfp8", dtype, (4, 64), [0, 1, 120, 126, 127, 128, 130, largest8]),
            microscaling(f"nvfp4.{dtype}", "dense", "nvfp4", dtype, (2, 32), [0x00, 0x01, 0x38, 0x7E]),
            microscaling(f"nvfp4.negative.{dtype}", "dense", "nvfp4", dtype, (1, 32), [0xB8, 0xFE]),
        ]
    return Spec(text(metadata()), [(t, None) for t in residents])


@vector
def zstd_records() -> Spec:
    """zstd and raw records side by side; every form of frame header; raw, RLE and compressed blocks."""
    ones = [1.0] * 40
    tensors = {
        "one.byte": (raw("one.byte", "norm", "f32", (40,), ones), {}),
        "two.bytes": (raw("two.bytes", "norm", "f32", (80,), ones * 2), {}),
        "windowed": (raw("windowed", "norm", "f32", (80,)), {"window": 0}),
        "odd.window": (raw("odd.window", "norm", "bf16", (640,)), {"window": 5}),
        "largest.window": (raw("largest.window", "norm", "f16", (64,)), {"window": 13 << 3, "width": 4}),
        "four.bytes": (raw("four.bytes", "norm", "u8", (100,)), {"width": 4}),
        "eight.bytes": (raw("eight.bytes", "norm", "i8", (100,)), {"width": 8, "window": 8}),
        "many.blocks": (raw("many.blocks", "norm", "i32", (64,), [i // 20 for i in range(64)]), {"size": 40}),
    }
    residents = [(t, coded(raw_record([t]), **options)) for t, options in tensors.values()]
    even = raw("compressed", "head", "i16", (16, 16), [i * i % 23 for i in range(256)])
    residents += [(even, compressed("compressed", even.codes))]
    residents += [(affine("stored.raw", "attention", 4, 64, "f16", (2, 64)), None)]
    story = ("the quick brown fox jumps over the lazy dog; " * 12 + "and so on").encode()
    files = [("tokenizer.json", story, compressed("story", story)), ("vocab.txt", b"a\nb\nc\n", None)]
    experts = []
    for i in range(3):
        some = _plain_expert(i)
        content = raw_record(some)
        experts.append(Expert(0, some, (compressed(f"expert {i}", content), coded(content, window=1), None)[i]))
    spec = Spec(text(metadata()), residents, files, [_plain_expert(0)], [(0, "layers.0.experts", experts)])
    spec.alignment = 256
    return spec


def _plain_expert(i: int) -> list[Tensor]:
    return [
        raw(f"{name}_proj.weight", "expert", "bf16", (8, 8), [float((i + j) * k % 5) for j in range(64)])
        for k, name in enumerate(("gate", "up", "down"), 1)
    ]


@vector
def layouts() -> Spec:
    """Layouts shared by layers and mixed in one; additive biases; fc1 and fc2; other modules; gaps in layer ids."""
    gated = [
        affine("gate_proj.weight", "expert", 2, 32, "bf16", (4, 32)), _bias("gate_proj", 4),
        affine("up_proj.weight", "expert", 3, 32, "bf16", (4, 32)), _bias("up_proj", 4),
        raw("down_proj.weight", "expert", "bf16", (32, 4)), _bias("down_proj", 32),
    ]  # fmt: skip
    finer = [
        affine("gate_proj.weight", "expert", 6, 32, "f16", (4, 32)), _bias("gate_proj", 4),
        affine("up_proj.weight", "expert", 5, 32, "f16", (4, 32)), _bias("up_proj", 4),
        raw("down_proj.weight", "expert", "f32", (32, 4)), _bias("down_proj", 32),
    ]  # fmt: skip
    simple = [
        microscaling("fc1.weight", "expert", "mxfp4", "bf16", (4, 32)), _bias("fc1", 4),
        microscaling("fc2.weight", "expert", "mxfp8", "bf16", (2, 32)),
        raw("scale", "expert", "f32", (1,), [0.5]), raw("lora.a", "expert", "f16", (2, 2)),
    ]  # fmt: skip
    layers = [
        (1, "layers.1.mlp", [Expert(0, gated), Expert(1, finer), Expert(0, gated)]),
        (3, "layers.3.mlp", [Expert(1, finer)]),
        (7, "layers.7.mlp", [Expert(2, simple), Expert(2, simple)]),
    ]
    spec = Spec(text(metadata()), [(raw("norm", "norm", "f32", (1,), [1.0]), None)], [], [gated, finer, simple], layers)
    spec.alignment = 1024
    return spec


def _bias(module: str, width: int) -> Tensor:
    return raw(f"{module}.bias", "expert", "bf16", (width,))


@vector
def aligned() -> Spec:
    """Expert records on 16 KiB, the default; padding follows every one of them."""
    spec = toy()
    spec.layers, spec.alignment = [moe_layer(0, 2)], 16384
    return spec


def digest_of(tensors: list[Tensor]) -> str:
    """The XXH64 of a raw record, as appendices write it."""
    return f"{xxhash.xxh64_intdigest(raw_record(tensors)):016x}"


@vector
def appendices() -> Spec:
    """Every registered appendix; a profile as zstd; tensors of a draft head."""
    spec = toy()
    spec.metadata = text(metadata(model={"config": {"model_type": "toy", "hidden_size": 32, "num_hidden_layers": 2}}))
    draft = [affine("draft.fc.weight", "draft", 4, 32, "bf16", (2, 64)), raw("draft.norm", "draft", "f32", (2,))]
    spec.residents += [(t, None) for t in draft]
    spec.appendices = [
        Appendix("PROF", profile(), coded(profile(), window=0)),
        Appendix("SPRS", sparsity(spec)),
        Appendix("DRFT", draft_head(draft)),
        Appendix("ASTC", b"reserved"),
        Appendix("ANEC", b"reserved"),
    ]
    return spec


def lines(*documents: Any) -> bytes:
    """JSON lines."""
    return b"".join(text(document) + b"\n" for document in documents)


def profile(layers: int = 2, **changes: Any) -> bytes:
    """A routing profile of the toy; `changes` replace members of its first layer, `header` those of its header."""
    head = {"appendix": "profile", "version": 1, "tokens": 100, "text_sha256": hashlib.sha256(b"text").hexdigest()}
    first = {
        "layer": 0, "counts": [60, 40, 0, 100], "gate_mass": [30.5, 20, 0, 49.25],
        "coactivation": [[0, 1, 10], [0, 3, 60], [1, 3, 40]],
    } | {k: v for k, v in changes.items() if k != "header"}  # fmt: skip
    rest = [{"layer": i, "counts": [50, 50, 50, 50], "gate_mass": [25, 25, 25, 25]} for i in range(1, layers)]
    return lines(head | changes.get("header", {}), first, *rest)


def sparsity(spec: Spec, **changes: Any) -> bytes:
    """Sparsity of the toy's experts; `changes` replace members of its first expert."""
    out: list[Any] = [{"appendix": "sparsity", "version": 1}]
    for layer, _, experts in spec.layers:
        entries = [
            {
                "clusters": 2, "boundaries": [0, 1, 2], "histogram": [0.25, 1], "predictor": {"kind": "none"},
                "digest": digest_of(e.tensors),
            }
            for e in experts
        ]  # fmt: skip
        if layer == 0:
            entries[0] |= changes
        out.append({"layer": layer, "width": 2, "experts": entries})
    return lines(*out)


def draft_head(tensors: list[Tensor], changes: dict[str, Any] | None = None) -> bytes:
    """A draft head that consists of `tensors`; `changes` replace members."""
    listed = [{"name": t.name, "digest": digest_of([t])} for t in tensors]
    document = {"appendix": "draft", "version": 1, "kind": "eagle", "hidden": 32, "source_layers": [0, 1]}
    return lines(document | {"tensors": listed} | (changes or {}))


@vector
def two_forms() -> Spec:
    """up_proj and fc1 in one layout, modules of one rank mixed; an unused layout; a draft head of another kind."""
    both = [
        affine("gate_proj.weight", "expert", 4, 32, "bf16", (2, 32)), raw("fc1.weight", "expert", "f16", (2, 1, 4)),
        _bias("fc1", 2), _bias("gate_proj", 2),
        raw("fc2.weight", "expert", "f16", (4, 2)), raw("up_proj.weight", "expert", "f16", (2, 32)),
        raw("down_proj.weight", "expert", "f16", (32, 2)),
    ]  # fmt: skip
    differing = [raw("fc1.weight", "expert", "f16", (5, 4)), raw("up_proj.weight", "expert", "f16", (3, 4))]
    neither = [raw("down_proj.weight", "expert", "f32", (4, 4)), raw("w", "expert", "i8", (3,))]
    config = {"model_type": "toy", "hidden_size": 16.0, "num_hidden_layers": None}
    draft = raw("draft.head.weight", "draft", "bf16", (4, 2))
    layers = [(2, "a.experts", [Expert(0, both), Expert(0, both)]), (5, "b.experts", [Expert(2, neither)])]
    spec = Spec(text(metadata(model={"config": config})), [(draft, None)], [], [both, differing, neither], layers)
    spec.appendices = [
        Appendix("SPRS", clusters(spec, 2, 7)),
        Appendix("DRFT", draft_head([draft], {"kind": "medusa", "hidden": 7, "source_layers": [0, 41]})),
    ]
    return spec


def clusters(spec: Spec, *widths: int) -> bytes:
    """Sparsity of experts of one cluster each, with a predictor that no version knows."""
    out: list[Any] = [{"appendix": "sparsity", "version": 1}]
    for (layer, _, experts), width in zip(spec.layers, widths, strict=True):
        least = {"clusters": 1, "boundaries": [0, width], "histogram": [0], "predictor": {"kind": "table", "rank": 8}}
        out.append(
            {"layer": layer, "width": width, "experts": [least | {"digest": digest_of(e.tensors)} for e in experts]}
        )
    return lines(*out)


@vector
def large_frame() -> Spec:
    """An embedded file of 300,000 bytes in a frame whose window is smaller; matches from block to block."""
    piece = Stream("large").take(4680)
    content = b"".join(piece[:-6] + b"%06d" % i for i in range(64)) + b"x" * 480
    spec = toy()
    spec.files = [("tokenizer.json", content, compressed("large", content, 17))]
    spec.layers = [moe_layer(0, 1)]
    return spec


@vector
def unknown() -> Spec:
    """What a reader must ignore: a newer minor version, an optional feature, sections, members, appendix versions."""
    spec = toy()
    spec.minor, spec.optional_features = 7, 1 << 63 | 1
    spec.metadata = text(metadata(future={"nested": [1, 2.5, None, True]}, recipe={"bits_by_layer": [4, 4]}))
    spec.appendices = [
        Appendix("xtra", b"anything"),
        Appendix("PROF", lines({"appendix": "profile", "version": 2, "other": []}, [1], "any JSON")),
        Appendix("A1b2", b"\0" * 100, coded(b"\0" * 100)),
    ]
    return spec


@vector
def permissive() -> Spec:
    """What a writer may do: names stored twice, JSON with spaces and any script, sections of any freedom."""
    spec = toy()
    spec.share_names = False
    spec.metadata = (
        ' {\n\t"provenance" : {"source": {"files": [{"name": "a/b.safetensors", "size": 9007199254740991, "sha256": "'
        + "0" * 64
        + '"}], "repo": "org/名前"}},\r\n "recipe": {"name": "\\u00e9\\ud83d\\ude00", "x": [1e308, -0.0, 1E-9, -0]},'
        ' "model": {"config": {"model_type": "qwen3_moe"}, "a\\/b": ""} }\n'
    ).encode()
    spec.residents.append((raw("層.0.重み", "other", "u8", (1,)), None))
    spec.residents.append((raw("x" * 512, "other", "u8", (1,)), None))
    spec.files.append(("_" + "A-b.9" * 25, b"x", None))
    return spec


def shard(index: int) -> Spec:
    """One of the two members of a sharded set; only the first lists the other."""
    spec = toy()
    spec.layers = [moe_layer(index, 4)]
    if index == 0:
        spec.files = [("tokenizer.json", b"{}", None)]
    else:
        spec.files, spec.residents = [], [(raw("lm_head.weight", "head", "bf16", (2, 2)), None)]
    return spec


@vector
def set_1() -> Spec:
    """The second member of a sharded set."""
    spec = shard(1)
    spec.metadata = text(metadata(set={"index": 1, "count": 2}))
    return spec


@vector
def set_0() -> Spec:
    """The first member of a sharded set, which lists the second by name, size and file id."""
    from .build import lay_out, seal

    second, spec = seal(lay_out(set_1())), shard(0)
    head_size = int.from_bytes(second[72:80], "little")
    sibling = {"name": "set-1.squizd", "size": len(second), "file_id": hashlib.sha256(second[:head_size]).hexdigest()}
    spec.metadata = text(metadata(set={"index": 0, "count": 2}, siblings=[sibling]))
    return spec


# -- the smallest of each kind: what most invalid files are made from ------------------------------------


@vector
def least() -> Spec:
    """The four sections that every file has, and one tensor of one byte."""
    return Spec(text(metadata()), [(_byte("t", 1), None)])


def _byte(name: str, value: int, role: str = "other") -> Tensor:
    return raw(name, role, "u8", (1,), [value])


@vector
def small() -> Spec:
    """Every section that is not an appendix, with as little as possible in it."""
    residents = [affine("a.weight", "dense", 2, 32, "f16", (1, 32)), _byte("n", 1, "norm")]
    modules = [(0, "m0", 2), (1, "m1", 1)]
    layers = [(layer, path, [Expert(0, _gated(i)) for i in range(count)]) for layer, path, count in modules]
    return Spec(text(metadata()), [(t, None) for t in residents], [("f", b"x", None)], [_gated(0)], layers)


def _gated(value: int) -> list[Tensor]:
    return [_byte(f"{name}_proj.weight", value, "expert") for name in ("gate", "up", "down")]


@vector
def framed() -> Spec:
    """One tensor of 160 bytes in a frame."""
    tensor = raw("one.byte", "norm", "f32", (40,), [1.0] * 40)
    return Spec(text(metadata()), [(tensor, coded(raw_record([tensor])))])


@vector
def notes() -> Spec:
    """The three appendices that are lines, stored raw; experts of two widths."""
    config = {"model_type": "toy", "hidden_size": 4, "num_hidden_layers": 2}
    draft = [_byte("d0", 1, "draft"), _byte("d1", 2, "draft")]
    layouts = [rows_of(2, 0), rows_of(3, 0)]
    layers = [(0, "m0", [Expert(0, rows_of(2, i)) for i in range(3)]), (1, "m1", [Expert(1, rows_of(3, 9))])]
    spec = Spec(text(metadata(model={"config": config})), [(t, None) for t in draft], [], layouts, layers)
    head = {"appendix": "profile", "version": 1, "tokens": 9, "text_sha256": "0" * 64}
    first = {"layer": 0, "counts": [9, 4, 0], "gate_mass": [1.5, 4, 0], "coactivation": [[0, 1, 4]]}
    spec.appendices = [
        Appendix("PROF", lines(head, first, {"layer": 1, "counts": [9], "gate_mass": [9]})),
        Appendix("SPRS", clusters(spec, 2, 3)),
        Appendix("DRFT", draft_head(draft, {"hidden": 4})),
    ]
    return spec


def rows_of(width: int, value: int) -> list[Tensor]:
    """The tensors of an expert that is nothing but an up_proj."""
    return [raw("up_proj.weight", "expert", "u8", (width,), [value] * width)]


@vector
def hits() -> Spec:
    """A profile whose `hits_by_slots` is as the text says in one layer, and means nothing in two."""
    layers = [(i, f"m{i}", [Expert(0, rows_of(2, 3 * i + e)) for e in range(3)]) for i in range(3)]
    spec = Spec(text(metadata()), [(_byte("r", 1), None)], [], [rows_of(2, 0)], layers)
    head = {"appendix": "profile", "version": 1, "tokens": 9, "text_sha256": "0" * 64}
    line = {"counts": [9, 4, 5], "gate_mass": [4.5, 2, 2.5]}
    values: list[Any] = [[[2, 7], [3, 15]], [[3, 15], [2, 7], [4, 99], [-1]], "many"]
    lines_of_layers = ({"layer": i, **line, "hits_by_slots": value} for i, value in enumerate(values))
    spec.appendices = [Appendix("PROF", lines(head, *lines_of_layers))]
    return spec


# -- just inside the limits ------------------------------------------------------------------------------


@vector
def limits() -> Spec:
    """Names, documents and layouts on the right side of each limit; what only looks like a fault."""
    owner = "m" * 9
    names = ["é" * 256, "T", "t", owner, f"{owner}x.y", f"{owner}-.z", "\u00a0", "\u202e\ufeff", "m.m", ".", ".m"]
    forms = [
        ["gate_proj.weight", "gate_proj.bias", "up_proj.weight", "up_proj.bias", "up_proj"],
        ["fc1.weight", "gate_proj.weight", "fc1.b", "gate_proj.b", "gate_proj"],
        ["fc1.b", "gate_proj.b", "fc1.c"],
        ["fc2.weight", "up_proj.weight", "up_proj.weight.x", "up_proj.x.weight", "down_proj.b"],
        ["down_proj.weight", ".gate_proj.weight", "gate_proj_weight", "Gate_proj.weight", "gate_proj .weight"],
        ["down_proj", "other.bias", "other.weight", "T", "t"],
    ]
    layouts = [[_byte(name, i, "expert") for i, name in enumerate(form)] for form in forms]
    layers = [(0, owner, [Expert(5, layouts[5])]), (2**32 - 1, f"{owner}0", [Expert(0, layouts[0])])]
    residents = [(_byte(name, i), None) for i, name in enumerate(names)]
    bare = ["A" * 128, "CON", "9", "_", "a-", "a..b", "_.a"]
    files = [(name, b"same", None) for name in bare]
    siblings = [{"name": name, "size": 0, "file_id": "0" * 64} for name in bare]
    odd = (
        '{"depth":' + "[" * 30 + "]" * 30 + ',"brackets":"' + "[{" * 40 + '","quote":"\\"' + "[" * 40 + '",'
        '"slashes":"\\\\","more":"\\\\\\"' + "[" * 40 + '","delete":"\x7f\x80\ufeff\uffff\U0010ffff",'
        '"integers":[9007199254740991,-9007199254740991,-0,0],'
        '"numbers":[1.7976931348623158e308,1e-400,0e99999999999999999999,-0.0,1E+00000000000000000001,'
        + "0." + "0" * 330 + "1e331," + "9" * 20 + '.0],"a":1,"A":2,"\u00e9":1,"e\u0301":2,"":{"":{"":0}},'
        '"pair":"\\uD83D\\ude00\\/\\b\\f\\n\\r\\t","list":[{"a":1},{"a":1}]}'
    )  # fmt: skip
    document = text(metadata(set={"index": 0, "count": len(bare) + 1}, siblings=siblings, description="\n"))
    spec = Spec(document[:-1] + b',"odd":' + odd.encode() + b"}\r\n\t ", residents, files, layouts, layers)
    spec.alignment = 128
    return spec


@vector
def largest_alignment() -> Spec:
    """A record_alignment of 2^24 without experts; the last of a set that could not be larger; a DRFT of version 0."""
    spec = least()
    spec.alignment = 1 << 24
    spec.metadata = text(metadata(set={"index": 2**53 - 2, "count": 2**53 - 1}, siblings=[], recipe={"name": ""}))
    spec.residents = [(_byte("d", 1, "draft"), None)]
    spec.appendices = [
        Appendix("DRFT", lines({"appendix": "draft", "version": 0}, [])),
        Appendix("PROF", lines({"appendix": "profile", "version": 2**53 - 1})),
    ]
    return spec


@vector
def extremes() -> Spec:
    """Values that reach the largest number of each float type, or round to it in binary64."""
    reach = [
        ("f16", 4, -4096.0, 4064.0), ("f16", 2, 21824.0, -32.0), ("bf16", 2, 85 * 2.0**120, 0.0),
        ("bf16", 2, -85 * 2.0**120, 1.0), ("f32", 2, 5592405 * 2.0**104, 2.0**74), ("f32", 8, 0.0, -0.0),
    ]  # fmt: skip
    return Spec(text(metadata()), [(reaching(f"reach.{i}", *each), None) for i, each in enumerate(reach)])


def reaching(name: str, dtype: str, bits: int, scale: float, bias: float) -> Tensor:
    """Two groups: the first has scale 0 and the opposite bias, the second the scale and bias."""
    t = affine(name, "dense", bits, 32, dtype, (1, 64))
    scales, biases = [0.0, scale], [-bias, bias]
    t.scales, t.biases = (b"".join(encode_float(v, dtype) for v in some) for some in (scales, biases))
    stream = int.from_bytes(t.codes, "little")
    codes = [stream >> bits * i & (1 << bits) - 1 for i in range(64)]
    t.values = [f32(f32(scales[i // 32] * q) + biases[i // 32]) for i, q in enumerate(codes)]
    return t


def joined(content: bytes, *blocks: tuple[int, int, bytes]) -> Coded:
    """A single segment of given blocks: kind, size, bytes."""
    some = [zstd.block(*each, last=i + 1 == len(blocks)) for i, each in enumerate(blocks)]
    return Coded(zstd.header(len(content)) + b"".join(some) + zstd.checksum(content))


@vector
def frame_limits() -> Spec:
    """As many blocks as allowed, blocks as large as the window, empty ones, and 64 bytes from each stored."""
    empty = (0, 0, b"")
    some = bytes(range(12))
    ratio = 64 * (7 + 3 + len(some) + 3 + 1 + 4)  # what the frame below takes: header, two blocks, checksum
    frames = [
        (b"hello", joined(b"hello", *[empty] * 16, (0, 5, b"hello"))),  # 66 bytes: 17 blocks
        (b"hello", joined(b"hello", (0, 5, b"hello"), (1, 0, b"z"))),
        (b"zzzzz", joined(b"zzzzz", (1, 5, b"z"), empty)),
        (b"hello", joined(b"hello", (0, 4, b"hell"), (2, 3, b"\x08o\0"))),
        (b"o" * 30, joined(b"o" * 30, (2, 3, b"\xf1o\0"))),
    ]
    content = some + b"q" * (ratio - len(some))
    frames.append((content, joined(content, (0, len(some), some), (1, ratio - len(some), b"q"))))
    window = bytes(range(256)) * 4
    frames.append((window + b"w" * 1024, coded(window + b"w" * 1024, window=0, size=1024)))
    spec = least()
    spec.files = [(f"f{i}", *each) for i, each in enumerate(frames)]
    return spec


@vector
def line_limits() -> Spec:
    """Lines of exactly 2^21 bytes, with exactly 2^17 commas and brackets, and 32 deep, in a frame."""
    head, deep = lines({"appendix": "profile", "version": 2}), b"[" * 32 + b"]" * 32 + b"\n"
    fill = 41000 - len(head) - len(deep)
    line, tokens = b'"' + b"x" * ((1 << 21) - 2) + b'"\n', b"[" + b"0," * ((1 << 17) - 1) + b"0]\n"
    first = head + deep + b'"' + b"y" * (fill - 3) + b'"\n'
    inner = compressed("tokens", tokens, 17).frame
    pieces, place, last = [(0, len(first), first)], 6 - (inner[4] >> 5 & 1) + (0, 2, 4, 8)[inner[4] >> 6], 0
    while not last:  # the blocks of a frame stand at the start of another as well
        number = int.from_bytes(inner[place : place + 3], "little")
        last, kind, size = number & 1, number >> 1 & 3, number >> 3
        taken = 1 if kind == 1 else size
        pieces.append((kind, size, inner[place + 3 : place + 3 + taken]))
        place += 3 + taken
    pieces += [(0, 1, b'"'), *[(1, 1 << 17, b"x")] * 15, (1, (1 << 17) - 2, b"x"), (0, 2, b'"\n')]
    spec, content = least(), first + tokens + line
    spec.appendices = [Appendix("PROF", content, joined(content, *pieces))]
    return spec
