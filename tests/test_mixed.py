"""Experts of one layer whose codes have different numbers of bits: slots hold the widest, answers stay the same.

The reference is an mlx-lm model that holds every expert at the most bits of its layer, packed by MLX's own rules.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from test_runtime_models import (
    QWEN3,
    TOKENS,
    assert_same_at_any_share,
    codes_of,
    experts_at,
    in_float32,
    logits,
    make_model,
    write_file,
)

import squizd.container as container
from squizd import kernels
from squizd.container import Plan, Writer
from squizd.container.layout import RAW, ZSTD, Encoding, MoeLayer, make_layout
from squizd.errors import ExpertReadError, SourceError
from squizd.kernels import layers as kernel_layers
from squizd.quantizers.packing import pack
from squizd.runtime import blueprint
from squizd.runtime import transfer as transfers
from squizd.runtime.lending import make_shelf
from squizd.runtime.load import load_model, state
from squizd.runtime.pager import Pager, Slots
from squizd.runtime.widening import spread_codes, widen_codes

WIDTHS = (2, 3, 4, 5, 6, 8)
PAIRS = [(few, many) for few in WIDTHS for many in WIDTHS if few < many]
EXPERTS = QWEN3["num_experts"]


@pytest.mark.parametrize("way", [widen_codes, spread_codes])
@pytest.mark.parametrize("bits", PAIRS)
def test_widened_codes_are_those_packed_wide(bits: tuple[int, int], way: Callable[..., None]) -> None:
    """Up to more than is done at once; what lies around is left alone."""
    for rows, cols in ((1, 32), (3, 96), (33, 2080)):
        codes = np.random.default_rng(rows).integers(0, 1 << bits[0], (rows, cols), np.uint8)
        few, many = (np.array(pack(mx.array(codes), b)).view(np.uint8).reshape(-1) for b in bits)
        room = np.full(many.size + 64, 0xA5, np.uint8)
        way(few, bits, room[32:-32])
        np.testing.assert_array_equal(room[32:-32], many)
        assert (room[:32] == 0xA5).all()
        assert (room[-32:] == 0xA5).all()


def switches(model: nn.Module) -> dict[str, QuantizedSwitchLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedSwitchLinear)}


Narrow = Callable[[str, int], int | None]


def mixed(
    tmp_path: Path, narrow: Narrow, wide: int, dtype: mx.Dtype = mx.bfloat16, codec: int = RAW
) -> tuple[Path, Any]:
    """A file whose experts have the bits that `narrow` says, `wide` if None, and a model with all of them wide."""
    model = make_model(QWEN3, experts_at(wide), dtype)
    for name, module in switches(model).items():
        codes = codes_of(np.array(module.weight), wide)
        for expert, own in enumerate(codes):
            own &= (1 << (narrow(f"{name}.weight", expert) or wide)) - 1
        if codec == ZSTD:  # random codes would be stored raw
            codes[:, ::2] = 1
        module.weight = pack(mx.array(codes), wide)
    mx.eval(model.parameters())
    return write_file(tmp_path / "m.squizd", model, QWEN3, codec=codec, narrow=narrow), model


def halves(few: int) -> Narrow:
    """Every other expert."""
    return lambda name, expert: few if expert % 2 else None


def thirds(name: str, expert: int) -> int | None:
    """Three widths, and no expert with the most bits for all of its tensors; 4 is None."""
    turn = ("gate_proj.weight", "up_proj.weight", "down_proj.weight").index(name.split(".", 5)[5])
    return (2, 3, None)[(expert + turn) % 3]


CASES: dict[str, tuple[Narrow, int, mx.Dtype, int]] = {
    **{f"{few} and {many}": (halves(few), many, mx.bfloat16, RAW) for few, many in ((2, 3), (3, 4), (4, 5), (4, 8))},
    "5 and 6, f16": (halves(5), 6, mx.float16, RAW),
    "2 and 8, f32, zstd": (halves(2), 8, mx.float32, ZSTD),
    "2, 3 and 4 by turns": (thirds, 4, mx.bfloat16, RAW),
    "2, 3 and 4 by turns, zstd": (thirds, 4, mx.bfloat16, ZSTD),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_widest(case: str, tmp_path: Path) -> None:
    file, model = mixed(tmp_path, *CASES[case])
    with container.open(file) as f:
        assert len({record.layout for record in f.experts(0)}) == (2 if CASES[case][0] is not thirds else 3)
        assert {record.codec for record in f.experts(0)} == {CASES[case][3]}
    assert_same_at_any_share(file, model)


@pytest.mark.parametrize("codec", [RAW, ZSTD])
def test_replayed_and_asked_for_tokens_read_the_same(tmp_path: Path, codec: int) -> None:
    """Raw records are read by native shelves, the others by Python; either way narrow ones are fewer bytes."""
    file, model = mixed(tmp_path, halves(2), 4, codec=codec)
    wanted = logits(in_float32(model))
    paged = load_model(file, resident="25%")
    for got, want in zip(logits(paged), wanted, strict=True):
        np.testing.assert_array_equal(got, want)
    found = state(paged)
    if not kernels.missing():
        assert found.replay.in_use == (codec == RAW)
    sizes = {r.stored_size for layer in found.file.moe_layers for r in found.file.experts(layer.layer)}
    assert len(sizes) > 1
    assert min(sizes) * found.stats.misses < found.stats.bytes_read < max(sizes) * found.stats.misses


def test_logits_are_those_of_mlx_lms_model_with_the_decoded_weights(tmp_path: Path) -> None:
    """Decoded by the container's own reader, from what is stored."""
    file, model = mixed(tmp_path, thirds, 4)
    plain = make_model(QWEN3, lambda path, module: "switch_mlp" not in path and experts_at(4)(path, module))
    with container.open(file) as f:
        for layer in f.moe_layers:
            records = [f.expert_arrays(layer.layer, expert) for expert in range(EXPERTS)]
            arrays = {f"{layer.path}.{n}": mx.array(np.stack([r[n] for r in records])) for n in records[0]}
            plain.update(tree_unflatten(list(arrays.items())), strict=False)
            for name, module in switches(model).items():
                if name.startswith(layer.path):
                    floats = (module.scales.astype(mx.float32), module.biases.astype(mx.float32))
                    slots = mx.dequantize(module.weight, *floats, module.group_size, module.bits)
                    assert mx.array_equal(slots, arrays[f"{name}.weight"]).item()
    with kernel_layers.switched_off():
        wanted = logits(in_float32(plain))
    for got, want in zip(logits(load_model(file, resident="50%")), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_slots_are_counted_at_their_width(tmp_path: Path) -> None:
    """The budget of a mixed file is that of the same experts stored wide."""
    file, model = mixed(tmp_path, halves(2), 8)
    wide = write_file(tmp_path / "wide.squizd", model, QWEN3)
    budgets = [state(load_model(path, resident="50%")).budget for path in (file, wide)]
    assert budgets[0].experts == budgets[1].experts > 0
    assert budgets[0].slots == budgets[1].slots
    assert file.stat().st_size < wide.stat().st_size


@pytest.mark.parametrize("reader", ["Python", "native", "transfer"])
def test_large_records_are_widened_piece_by_piece(reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of more than is read at once, of widths that do not divide it."""
    if reader == "native" and kernels.missing():
        pytest.skip(kernels.missing())
    if reader == "transfer":
        if transfers.missing():
            pytest.skip(transfers.missing())
        monkeypatch.setattr(blueprint, "widened", lambda stored: "")  # GPUs compute in the types of the file
    shapes = {"up_proj.weight": (700, 2048), "down_proj.weight": (1184, 1376)}
    bits = [(3, 4), (5, 2), (3, 6)]  # nobody has (5, 6)
    layouts = []
    for widths in bits:
        some = zip(shapes, widths, strict=True)
        layouts.append(make_layout([(n, "expert", Encoding("affine", "bf16", b, 32), shapes[n]) for n, b in some]))
    rng = np.random.default_rng(0)
    contents = [{t.name: [rng.bytes(size) for _, _, size in t.parts] for t in layout.tensors} for layout in layouts]
    plan = Plan(
        metadata={"model": {"config": {"model_type": "none"}}, "recipe": {}, "provenance": {}},
        residents=[("norm", "norm", Encoding("raw", "f32"), (1,))],
        layouts=layouts,
        moe_layers=[MoeLayer(0, "experts", len(bits))],
        expert_layouts=[[0, 1, 2]],
        record_alignment=64,
    )
    with Writer(tmp_path / "m.squizd", plan) as writer:
        writer.write([[bytes(4)]])
        for layout, parts in zip(layouts, contents, strict=True):
            writer.write([parts[t.name] for t in layout.tensors])
        writer.finish()
    file = container.open(tmp_path / "m.squizd")
    widest = blueprint._widest(file, "experts", [0, 1, 2])
    targets = blueprint._expert_targets(widest.values())
    banks = [np.zeros((3, target.part.target_bytes), np.uint8) for target in targets]
    scatters = {i: blueprint._scatter(layout, widest) for i, layout in enumerate(layouts)}
    found = Pager(file)
    if reader == "transfer":
        sizes = [record.stored_size for record in file.experts(0)]
        found.transfer = transfers.Transfer(transfers.buffer_bytes([s.parts for s in scatters.values()], sizes), "")
    slots = Slots(found, file.moe_layers[0], banks, scatters)
    if reader == "native":
        shelf = make_shelf(kernels.native(), slots)
        shelf.arrange(slots.order(), *slots.state())
        where = dict(enumerate(shelf.place([0, 1, 2])))
    else:
        slots.acquire([0, 1, 2])
        assert (slots.shelf_handle is not None) == (reader == "transfer")
        where = slots.slot_of
    for expert, parts in enumerate(contents):
        for target, bank in zip(targets, banks, strict=True):
            name, _, part = target.name.rpartition(".")
            stored = parts[f"{name}.weight"][("weight", "scales", "biases").index(part)]
            if part == "weight":
                own = dict(zip(shapes, bits[expert], strict=True))[target.name]
                codes = codes_of(np.frombuffer(stored, np.uint32), own)
                stored = np.array(pack(mx.array(codes), widest[target.name].encoding.bits)).tobytes()
            elif blueprint.widened("bf16"):
                stored = (np.frombuffer(stored, np.uint16).astype(np.uint32) << 16).tobytes()
            assert bank[where[expert]].tobytes() == stored, (expert, target.name)
    found.close()


@pytest.mark.parametrize("resident", ["100%", "25%"])
def test_damage_of_a_narrow_record_is_found(tmp_path: Path, resident: str) -> None:
    """While it is loaded; when a prompt, or (with the kernels) a replayed token asks for it."""
    file, _ = mixed(tmp_path, halves(3), 4)
    whole = file.read_bytes()
    with container.open(file) as f:
        found = [f.experts(x.layer) for x in f.moe_layers]
    narrow = min(r.stored_size for r in found[0])
    model = None if resident == "100%" else load_model(file, resident=resident)
    cache = None if model is None else make_prompt_cache(model)
    if model is not None:
        for i in range(4):
            mx.eval(model(mx.array(TOKENS[:, i : i + 1]), cache=cache))
    with file.open("r+b") as out:
        for record in (r for layer in found for r in layer if r.stored_size == narrow):
            out.seek(record.offset + narrow // 3)
            out.write(bytes([whole[record.offset + narrow // 3] ^ 16]))
    with pytest.raises(ExpertReadError, match="do not match their digest") as caught:
        if model is None:
            load_model(file)
        else:
            for i in range(4, 40):
                mx.eval(model(mx.array(TOKENS[:, i : i + 1]), cache=cache))
    assert caught.value.expert % 2


AFFINE_4 = Encoding("affine", "bf16", 4, 32)


@pytest.mark.parametrize(
    "other",
    [
        {"encoding": Encoding("affine", "bf16", 4, 64)},
        {"encoding": Encoding("affine", "f16", 3, 32)},
        {"encoding": Encoding("mxfp4", "bf16", 4, 32)},
        {"encoding": Encoding("raw", "bf16")},
        {"shape": (32, 128)},
        {"name": "up_proj.weight"},
    ],
    ids=lambda other: str(*other.values()),
)
def test_experts_that_differ_in_more_are_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    first = {"name": "gate_proj.weight", "encoding": AFFINE_4, "shape": (32, 64)}
    layouts = [make_layout([(t["name"], "expert", t["encoding"], t["shape"])]) for t in (first, first | other)]
    path = "model.layers.0.mlp.switch_mlp"
    numbers = [expert // 5 for expert in range(EXPERTS)]
    plan = Plan(
        metadata={"model": {"config": QWEN3}, "recipe": {}, "provenance": {}},
        residents=[("norm", "norm", Encoding("raw", "f32"), (1,))],
        layouts=layouts,
        moe_layers=[MoeLayer(0, path, EXPERTS)],
        expert_layouts=[numbers],
        record_alignment=64,
    )
    with Writer(tmp_path / "m.squizd", plan) as writer:
        writer.write([[bytes(4)]])
        for number in numbers:
            writer.write([[bytes(size) for _, _, size in t.parts] for t in layouts[number].tensors])
        writer.finish()
    with pytest.raises(SourceError, match=f"{path} are not all stored alike .see shard layout 1") as caught:
        load_model(tmp_path / "m.squizd")
    assert "only the bits of affine tensors may differ" in caught.value.hint
