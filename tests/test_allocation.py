"""Allocation against brute force; plans through files; a whole file within its target."""

from __future__ import annotations

import json
import random
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CommandLine

import squizd
from squizd import choosing
from squizd.allocation import Option, Plan, Unit, allocate, shuffled
from squizd.checkpoint import open_checkpoint
from squizd.container.layout import Encoding
from squizd.errors import RecipeError
from squizd.guide import Calibration
from squizd.inspection import weight_size
from squizd.planning import divided


def units(seed: int, count: int) -> list[Unit]:
    source = random.Random(seed)
    found = []
    for i in range(count):
        size = source.choice([100, 1000, 5000])
        scale = source.uniform(0.1, 10)
        options = [Option(f"{b}g64", size * b, scale * 4.0**-b * source.uniform(0.8, 1.2)) for b in (2, 3, 4, 6)]
        found.append(Unit(f"t{i}", size, tuple(options)))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_within_the_budget_loses_less(seed: int) -> None:
    some = units(seed, 6)
    least, most = (sum(f(o.bits for o in u.options) for u in some) for f in (min, max))
    for share in (0.0, 0.13, 0.5, 0.87, 1.0):
        budget = int(least + share * (most - least))
        chosen = allocate(some, budget)
        assert sum(o.bits for o in chosen) <= budget
        best = min(
            sum(o.loss for o in c) for c in product(*(u.options for u in some)) if sum(o.bits for o in c) <= budget
        )
        assert sum(o.loss for o in chosen) == pytest.approx(best, rel=1e-9)


def test_a_budget_far_above_the_granularity_is_nearly_exhausted() -> None:
    some = [Unit(u.name, u.parameters * 10**7, tuple(Option(o.spec, o.bits * 10**7 + 12345, o.loss) for o in u.options))
            for u in units(3, 40)]  # fmt: skip
    parameters = sum(u.parameters for u in some)
    chosen = allocate(some, int(3.5 * parameters))
    assert 3.48 < sum(o.bits for o in chosen) / parameters <= 3.5


def test_a_target_out_of_reach_is_an_error() -> None:
    some = units(0, 3)
    with pytest.raises(RecipeError, match="the smallest encodings take"):
        allocate(some, sum(min(o.bits for o in u.options) for u in some) - 1)


def test_the_control_has_the_same_encodings_and_size() -> None:
    some = [Unit(f"t{i}", 100, u.options) for i, u in enumerate([units(1, 1)[0]] * 20)]
    chosen = allocate(some, 20 * 100 * 3)
    chosen[:3] = [some[0].options[0], some[0].options[3], some[0].options[2]]
    dealt = shuffled(some, chosen, 5)
    assert sorted(o.spec for o in dealt) == sorted(o.spec for o in chosen)
    assert [o.spec for o in dealt] != [o.spec for o in chosen]
    assert dealt == shuffled(some, chosen, 5)


def test_the_control_draws_experts() -> None:
    options = (Option("2g64", 100, 1.0), Option("2g64", 150, 0.5, "3g64", (0, 1, 2, 3)))
    some = [Unit(f"t{i}", 100, options, 8) for i in range(12)]
    chosen = [options[i % 2] for i in range(12)]
    dealt = shuffled(some, chosen, 1)
    assert sorted((o.bits, len(o.experts)) for o in dealt) == sorted((o.bits, len(o.experts)) for o in chosen)
    drawn = {o.experts for o in dealt if o.experts}
    assert len(drawn) > 3
    assert all(len(set(e)) == 4 and set(e) <= set(range(8)) for e in drawn)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tensors": {"a": 3}}', '{"tensors": [1]}'])
def test_what_is_no_plan(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan").write_text(text)
    with pytest.raises(RecipeError, match="holds no plan"):
        Plan.load(tmp_path / "plan")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("The city was founded in the year of the fire. The river runs north. " * 40)
    return path


def encodings_of_experts(f: squizd.File) -> dict[tuple[str, int, str], str]:
    """By module, expert and tensor."""
    return {
        (x.path, expert, t.name): str(t.encoding)
        for x in f.moe_layers
        for expert, r in enumerate(f.experts(x.layer))
        for t in f.layouts[r.layout].tensors
    }


GATE = "model.layers.0.mlp.switch_mlp.gate_proj.weight"


def mixed_plan(tiny: Path, path: Path) -> Plan:
    """All 4g64 but some experts of two projections."""
    candidates, _, _ = choosing.survey(open_checkpoint(tiny))
    tensors = {c.name: "4g64" for c in candidates}
    apart = {GATE: {"2g64": [0, 3], "8g64": [1]}, GATE.replace("gate_proj", "down_proj"): {"3g64": [3, 5]}}
    plan = Plan(4.0, tensors, {}, apart)
    plan.save(path)
    return plan


def test_experts_of_a_layer_get_the_encodings_that_the_plan_names(tiny: Path, tmp_path: Path) -> None:
    import mlx.core as mx
    import numpy as np

    plan = mixed_plan(tiny, tmp_path / "plan")
    assert Plan.load(tmp_path / "plan") == plan
    assert "4g64, 2 experts 2g64, 1 experts 8g64" in plan.describe()
    squizd.compress(tiny, tmp_path / "a", plan=tmp_path / "plan", quantizer="minmax")
    weights = {k: v for shard in sorted(tiny.glob("*.safetensors")) for k, v in mx.load(str(shard)).items()}
    with squizd.open(tmp_path / "a") as f:
        down = GATE.replace("gate_proj", "down_proj")
        assert f.metadata["recipe"]["apart"] == {GATE: {"2g64": 2, "8g64": 1}, down: {"3g64": 2}}
        layer = f.moe_layers[0]
        for expert in range(layer.expert_count):
            arrays = f.expert_arrays(layer.layer, expert)
            for projection in ("gate_proj", "up_proj", "down_proj"):
                apart = plan.apart.get(GATE.replace("gate_proj", projection), {})
                bits = next((int(s[0]) for s, some in apart.items() if expert in some), 4)
                source = weights[f"model.layers.0.mlp.experts.{expert}.{projection}.weight"]
                codes, *grids = mx.quantize(source, group_size=64, bits=bits)
                expected = mx.dequantize(codes, *[g.astype(mx.float32) for g in grids], group_size=64, bits=bits)
                found = f.layouts[f.expert(layer.layer, expert).layout].tensors
                (tensor,) = [t for t in found if t.name == f"{projection}.weight"]
                assert tensor.encoding.bits == bits
                np.testing.assert_allclose(arrays[tensor.name], np.array(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("apart", "message"),
    [
        ({GATE: {"3g32": [0]}}, "expert 0 cannot be 3g32 beside affine"),
        ({GATE: {"3g64": [64]}}, "has 32 experts, and 64 is none of them"),
        ({"model.embed_tokens.weight": {"3g64": [0]}}, "embed_tokens.weight has no experts"),
        ({"model.norm.weight": {"3g64": [0]}}, "holds no plan"),
        ({GATE: {"keep": [1]}}, "expert 1 cannot be keep"),
        ({GATE: {"3g64": [1, 1]}}, "holds no plan"),
        ({GATE: {"3g64": [1], "2g64": [1]}}, "holds no plan"),
        ({GATE: {"3g64": ["1"]}}, "holds no plan"),
        ({"elsewhere": {"3g64": [1]}}, "holds no plan"),
    ],
)
def test_experts_that_cannot_be_apart(apart: dict[str, Any], message: str, tiny: Path, tmp_path: Path) -> None:
    plan = mixed_plan(tiny, tmp_path / "plan")
    plan.apart = apart
    plan.save(tmp_path / "plan")
    with pytest.raises(RecipeError, match=message):
        squizd.compress(tiny, tmp_path / "a", plan=tmp_path / "plan", quantizer="minmax")
    assert [p.name for p in tmp_path.iterdir()] == ["plan"]


def test_experts_apart_are_fitted_as_all_would_be(tiny: Path, text: Path, tmp_path: Path) -> None:
    """mse with each expert's own statistics: the bytes of files that have one encoding for all."""
    known = {"calibration": Calibration(text, 4, 24), "statistics": tmp_path / "s", "quantizer": "mse"}
    plan = mixed_plan(tiny, tmp_path / "plan")
    squizd.compress(tiny, tmp_path / "a", plan=tmp_path / "plan", **known)
    for bits in (2, 4, 8):
        Plan(4.0, {**plan.tensors, GATE: f"{bits}g64"}).save(tmp_path / "even")
        squizd.compress(tiny, tmp_path / "b", plan=tmp_path / "even", force=True, **known)
        with squizd.open(tmp_path / "a") as a, squizd.open(tmp_path / "b") as b:
            layer = a.moe_layers[0].layer
            some = [e for e in range(a.moe_layers[0].expert_count) if bits == {0: 2, 3: 2, 1: 8}.get(e, 4)]
            assert some
            for expert in some:
                found = [
                    [bytes(f.read_expert(layer, expert)[offset : offset + size]) for _, offset, size in t.parts]
                    for f in (a, b)
                    for t in f.layouts[f.expert(layer, expert).layout].tensors
                    if t.name == "gate_proj.weight"
                ]
                assert found[0] == found[1]


def test_bits_in_memory_are_those_of_the_widest(tiny: Path, tmp_path: Path, cli: CommandLine) -> None:
    mixed_plan(tiny, tmp_path / "plan")
    made = squizd.compress(tiny, tmp_path / "a", plan=tmp_path / "plan", quantizer="minmax")
    with squizd.open(tmp_path / "a") as f:
        total = sum(t.weight_bytes for t, _ in f.residents.values())
        for x in f.moe_layers:
            for name in ("gate_proj.weight", "up_proj.weight", "down_proj.weight"):
                every = [
                    t.weight_bytes for r in f.experts(x.layer) for t in f.layouts[r.layout].tensors if t.name == name
                ]
                total += x.expert_count * max(every)
        assert made.memory_bits_per_weight == pytest.approx(8 * total / weight_size(f).parameters)
    assert made.memory_bits_per_weight > made.bits_per_weight + 0.1
    out = (
        cli("compress", tiny, "-o", tmp_path / "b", "--plan", tmp_path / "plan", "--quantizer", "minmax").success().out
    )
    assert f"({made.memory_bits_per_weight:.3f} in memory)" in out


def test_experts_are_alike_if_that_is_asked_for(tiny: Path, text: Path, tmp_path: Path) -> None:
    known = {"calibration": Calibration(text, 4, 24), "statistics": tmp_path / "s", "quantizer": "mse"}
    plans = [squizd.plan(tiny, target_bpw=3.2, alike=alike, **known) for alike in (False, True)]
    assert plans[0].apart
    assert not plans[1].apart
    assert sum(plans[0].expected.values()) < sum(plans[1].expected.values())
    assert all(3.15 < plan.bits_per_weight <= 3.2 for plan in plans)
    with pytest.raises(RecipeError, match="there is none"):
        squizd.compress(tiny, tmp_path / "a", alike=True)


def test_overrides_count_in_a_target(tiny: Path, text: Path, tmp_path: Path) -> None:
    known = {"calibration": Calibration(text, 4, 24), "statistics": tmp_path / "s", "quantizer": "mse"}
    squizd.compress(tiny, tmp_path / "a", target_bpw=4.6, overrides=["*down_proj=8g32"], **known)
    with squizd.open(tmp_path / "a") as f:
        assert 4.5 < weight_size(f).bits_per_weight <= 4.6
        assert {str(t.encoding) for x in f.layouts for t in x.tensors if t.name == "down_proj.weight"} == {
            "affine 8-bit g32 (bf16)"
        }


def test_an_override_is_for_all_experts_of_a_plan(tiny: Path, tmp_path: Path) -> None:
    mixed_plan(tiny, tmp_path / "plan")
    squizd.compress(tiny, tmp_path / "a", plan=tmp_path / "plan", quantizer="minmax", overrides=["*gate_proj=6g64"])
    with squizd.open(tmp_path / "a") as f:
        found = encodings_of_experts(f)
        bits = {projection: {e.encoding.bits for x in f.layouts for e in x.tensors if e.name == f"{projection}.weight"}
                for projection in ("gate_proj", "down_proj")}  # fmt: skip
    assert found
    assert bits == {"gate_proj": {6}, "down_proj": {3, 4}}


def test_the_wider_encoding_goes_where_it_takes_away_most() -> None:
    source = np.random.default_rng(0)
    encodings = [Encoding("affine", "bf16", bits, group) for bits in (2, 3, 6) for group in (64, 128)]
    losses = source.uniform(0.5, 2, (1, 9)) * np.array([[4.0**-e.bits * e.group_size] for e in encodings])
    losses *= source.uniform(0.9, 1.1, losses.shape)
    bits = [9000 * e.bits + 100 * 128 // e.group_size for e in encodings]
    found = list(divided(encodings, bits, losses))
    pairs = {(o.spec, o.other) for o in found}
    assert pairs == {("2g64", "3g64"), ("2g128", "3g128"), ("3g64", "6g64"), ("3g128", "6g128")}
    for option in found:
        low, high = ([f"{e.bits}g{e.group_size}" for e in encodings].index(s) for s in (option.spec, option.other))
        count = len(option.experts)
        best = min(
            sum(losses[high if e in some else low][e] for e in range(9)) for some in combinations(range(9), count)
        )
        assert option.loss == pytest.approx(best, rel=1e-12)
        assert option.bits == bits[low] + (bits[high] - bits[low]) * count // 9


MSE = ["--quantizer", "mse"]  # a twentieth of gptq's time to write a file, where only its encodings matter


@pytest.mark.parametrize(("target", "quantizer"), [(3.2, "mse"), (4.5, "gptq")])
def test_a_file_has_the_bits_that_were_asked_for_and_its_plan_can_be_replayed(
    target: float, quantizer: str, tiny: Path, text: Path, tmp_path: Path, cli: CommandLine
) -> None:
    options = ["--calibration", text, "--windows", "4", "--context", "24", "--statistics", tmp_path / "s"]
    options += MSE if quantizer == "mse" else []
    plan = tmp_path / "plan.json"
    cli("compress", tiny, "-o", tmp_path / "a", *options, "--target-bpw", target, "--save-plan", plan).success()
    with squizd.open(tmp_path / "a") as f:
        assert target - 0.02 <= weight_size(f).bits_per_weight <= target
        routers = [t for t, _ in f.residents.values() if t.role == "router"]
        assert routers
        assert all(t.encoding.bits >= 8 for t in routers)
        others = [t for t, _ in f.residents.values() if t.encoding.mode == "affine"]
        assert len({str(t.encoding) for t in others}) > 2
        assert f.metadata["recipe"]["quantizer"] == quantizer  # gptq, the best that calibration allows, unasked
        encodings = encodings_of_experts(f)
        assert len(set(encodings.values())) > 1
        recipe = f.metadata["recipe"]
    cli("compress", tiny, "-o", tmp_path / "b", *options, "--plan", plan).success()
    with squizd.open(tmp_path / "b") as f:
        assert f.metadata["recipe"]["overrides"] == recipe["overrides"]
        assert encodings_of_experts(f) == encodings
    _, tokenizer = squizd.load(tmp_path / "b", resident="50%")
    assert tokenizer.encode("river")
    facts = json.loads(plan.read_text())
    changed = next(name for name in facts["tensors"] if "down_proj" in name)
    facts["tensors"][changed] = "8g32"
    facts.get("apart", {}).pop(changed, None)
    plan.write_text(json.dumps(facts))
    cli("compress", tiny, "-o", tmp_path / "c", *options, *MSE, "--plan", plan).success()
    with squizd.open(tmp_path / "c") as f:
        path = changed.removesuffix(".down_proj.weight")
        (layer,) = [x.layer for x in f.moe_layers if x.path == path]
        found = {t.name: t.encoding for t in f.layouts[f.expert(layer, 0).layout].tensors}
        assert (found["down_proj.weight"].bits, found["down_proj.weight"].group_size) == (8, 32)


def test_a_target_counts_what_is_stored(tiny: Path, text: Path, tmp_path: Path, cli: CommandLine) -> None:
    options = ["--calibration", text, "--windows", "4", "--context", "24", "--target-bpw", "4"]
    cli("compress", tiny, "-o", tmp_path / "a", *options, "--zstd").success()
    with squizd.open(tmp_path / "a") as f:
        assert 3.9 <= weight_size(f).bits_per_weight <= 4
        raw = sum(t.weight_bytes for t, _ in f.residents.values())
        for layer in f.moe_layers:
            raw += sum(t.weight_bytes for r in f.experts(layer.layer) for t in f.layouts[r.layout].tensors)
        assert raw * 8 / weight_size(f).parameters > 4.02  # what the codes take once read


def test_a_plan_is_printed_without_a_file(tiny: Path, text: Path, tmp_path: Path, cli: CommandLine) -> None:
    options = ["--calibration", text, "--windows", "4", "--context", "24"]
    out = cli("compress", tiny, "-o", tmp_path / "a", *options, "--target-bpw", "4", "--plan-only").success().out
    assert out.splitlines()[-1].endswith("bits per weight")
    assert any("down_proj" in line for line in out.splitlines())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("zstd", [[], ["--zstd"]])
def test_a_target_size_is_kept(zstd: list[str], tiny: Path, text: Path, tmp_path: Path, cli: CommandLine) -> None:
    """Tokenizer, indexes and padding included; what is left of it is less than the next encoding of a tensor takes."""
    options = ["--calibration", text, "--windows", "4", "--context", "24", "--statistics", tmp_path / "s", *MSE, *zstd]
    for size in (2_200_000, 3_000_000):
        cli("compress", tiny, "-o", tmp_path / "a", "--force", *options, "--target-size", str(size)).success()
        assert (0.95 if zstd else 0.995) * size < (tmp_path / "a").stat().st_size <= size


def test_measured_divergence_is_that_of_the_model_with_one_tensor_rounded(tiny: Path, text: Path) -> None:
    import mlx.core as mx
    import numpy as np

    from squizd import calibration, corpus
    from squizd.evaluation import Subject
    from squizd.sensitivity import divergences

    checkpoint = open_checkpoint(tiny)
    windows = calibration.windows_of(corpus.read(text), checkpoint, 24, 3, 0)
    candidates, _, _ = choosing.survey(checkpoint)
    found = divergences(checkpoint, windows, {c.path: c.reference for c in candidates})
    subject = Subject(str(tiny))

    def log_probabilities() -> np.ndarray:
        rows = [np.array(subject.model(mx.array([w]))[0]).astype(np.float64) for w in windows]
        x = np.concatenate(rows)
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    clean = log_probabilities()
    modules = {path.replace(".inner", ""): m for path, m in subject.model.named_modules()}
    inside = [c for c in candidates if c.path in found and not c.path.endswith("embed_tokens")]
    some = [*inside[::5], *[c for c in candidates if c.path.endswith("embed_tokens")]]  # as input and as the head
    for c in some:
        module = modules[c.path]
        exact, (bits, group) = module["weight"], c.reference
        module["weight"] = mx.dequantize(*mx.quantize(exact, group_size=group, bits=bits), group_size=group, bits=bits)
        other = log_probabilities()
        module["weight"] = exact
        expected = (np.exp(clean) * (clean - other)).sum(axis=-1).mean()
        assert found[c.path] == pytest.approx(expected, rel=0.05, abs=2e-7), c.path
    assert len(some) > 3
