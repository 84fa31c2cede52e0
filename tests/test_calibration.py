"""Statistics against direct sums over mlx-lm's own forward pass, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import CommandLine
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear

import squizd
from squizd import calibration, corpus, listening, routed
from squizd.calibration import calibrate
from squizd.checkpoint import open_checkpoint
from squizd.container.layout import Encoding
from squizd.errors import RecipeError, SourceError
from squizd.evaluation import Subject
from squizd.guide import Calibration, Guide, prepare
from squizd.kernels import layers
from squizd.knowledge import Statistics
from squizd.routed import PRIOR_TOKENS
from squizd.single import with_stored

CONTEXT, COUNT = 24, 5


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("The city was founded in the year of the fire. The river runs north. " * 40)
    return path


@pytest.fixture(scope="module")
def statistics(tiny: Path, text: Path) -> Statistics:
    return calibrate(open_checkpoint(tiny), corpus.read(text), context=CONTEXT, count=COUNT, seed=3)


def direct(tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[np.ndarray, ...]]]:
    """Inputs of every linear layer, and (x, chosen, gates) of every expert module, in a plain pass through MLX."""
    checkpoint = open_checkpoint(tiny)
    windows = calibration.windows_of(corpus.read(text), checkpoint, CONTEXT, COUNT, 3)
    model = Subject(str(tiny)).model
    paths = {id(module): path.removesuffix(".inner").replace(".inner.", ".") for path, module in model.named_modules()}
    seen: dict[str, list[tuple[np.ndarray, ...]]] = {}

    def watch(kind: type, keep: Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]) -> None:
        original = kind.__call__

        def call(self: Any, *args: Any) -> Any:
            found = keep(self, args)
            seen.setdefault(paths[id(self)], []).append(tuple(np.array(x).astype(np.float64) for x in found))
            return original(self, *args)

        monkeypatch.setattr(kind, "__call__", call)

    for module in model.modules():  # the kernels change classes of modules: plain ones here
        if isinstance(module, nn.Linear):
            module.__class__ = nn.Linear
        if isinstance(module, SwitchLinear):
            module.__class__ = SwitchLinear
        if isinstance(module, SwitchGLU):
            module.__class__ = SwitchGLU
    watch(nn.Linear, lambda self, args: (args[0].reshape(-1, args[0].shape[-1]),))
    watch(SwitchGLU, lambda self, args: (args[0].reshape(-1, args[0].shape[-1]),
                                         args[1].reshape(-1, args[1].shape[-1])))  # fmt: skip
    with layers.switched_off():
        for window in windows:
            mx.eval(model(mx.array([window])))
    return seen


def test_moments_counts_and_gates_are_those_of_a_plain_pass(
    tiny: Path, text: Path, statistics: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = direct(tiny, text, monkeypatch)
    weights: dict[str, mx.array] = {}
    for shard in open_checkpoint(tiny).shards:
        weights |= mx.load(str(shard))

    def weight(name: str) -> np.ndarray:
        return np.array(weights[name].astype(mx.float32)).astype(np.float64)

    for path, parts in seen.items():
        if path not in statistics.tokens:
            x = np.concatenate([p[0] for p in parts])
            np.testing.assert_allclose(statistics.moments[path], (x * x).mean(axis=0), rtol=1e-3, atol=1e-6)
            products = x.T @ x / len(x)
            found = statistics.hessian(path)
            assert found is not None
            np.testing.assert_allclose(found, products, rtol=1e-3, atol=1e-4 * np.abs(products).max())
    assert all("k_proj" in p or "v_proj" in p for p in statistics.shared)  # what has the query's inputs is kept once
    assert len(statistics.shared) == 2 * len(statistics.tokens)
    checked = 0
    for path, tokens in statistics.tokens.items():
        x, chosen = (np.concatenate([p[i] for p in seen[path]]) for i in range(2))
        assert tokens.sum() == chosen.size
        np.testing.assert_array_equal(tokens, np.bincount(chosen.astype(int).reshape(-1), minlength=len(tokens)))
        # The fixture's router: softmax over all experts, the chosen ones normalized to 1.
        block = path.rpartition(".")[0]
        logits = x @ weight(f"{block}.gate.weight").T
        shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
        gates = np.take_along_axis(shares, chosen.astype(int), axis=-1)
        gates /= gates.sum(axis=-1, keepdims=True)
        mass, moment_in, moment_out = np.zeros(len(tokens)), [], []
        squares = np.zeros(len(tokens))
        for expert in range(len(tokens)):
            rows, slots = np.nonzero(chosen == expert)
            g = gates[rows, slots]
            mass[expert], squares[expert] = g.sum(), (g * g).sum()
            w = {p: weight(f"{block}.experts.{expert}.{p}.weight") for p in ("gate_proj", "up_proj")}
            a, b = x[rows] @ w["gate_proj"].T, x[rows] @ w["up_proj"].T
            hidden = a / (1 + np.exp(-a)) * b
            moment_in.append(((x[rows] * g[:, None]) ** 2).sum(axis=0))
            moment_out.append(((hidden * g[:, None]) ** 2).sum(axis=0))
        np.testing.assert_allclose(statistics.mass[path], mass, rtol=1e-3, atol=1e-4)
        prior = PRIOR_TOKENS * (gates**2).mean()
        for projection, moment in (("up_proj", moment_in), ("gate_proj", moment_in), ("down_proj", moment_out)):
            total = np.stack(moment)
            expected = (total + prior * total.sum(axis=0) / squares.sum()) / (squares[:, None] + prior)
            np.testing.assert_allclose(statistics.moments[f"{path}.{projection}"], expected, rtol=2e-3, atol=1e-7)
            never = tokens == 0
            if never.any():  # an expert that no token reached has its layer's statistics
                layer = total.sum(axis=0) / squares.sum()
                np.testing.assert_allclose(
                    statistics.moments[f"{path}.{projection}"][never],
                    np.broadcast_to(layer, (never.sum(), layer.size)),
                    rtol=2e-3,
                    atol=1e-7,
                )
        checked += 1
    assert checked == len(statistics.tokens) > 0


def test_hessians_are_sums_of_products(
    tiny: Path, text: Path, statistics: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny)
    windows = calibration.windows_of(corpus.read(text), checkpoint, CONTEXT, COUNT, 3)
    monkeypatch.setattr(routed, "PIECE", 7)
    for inputs in calibration.expert_inputs(checkpoint, windows):
        assert inputs.path in statistics.tokens
        busiest = int(np.argmax(statistics.tokens[inputs.path]))
        assert statistics.tokens[inputs.path][busiest] > routed.PIECE  # its sums are made in pieces
        for projection in ("up_proj", "down_proj"):
            (h,) = inputs.hessians(projection, [busiest])
            tokens, g = inputs.rows(busiest)
            x = inputs.x.rows(tokens)
            x = np.array(inputs.hidden(x, busiest) if projection == "down_proj" else x).astype(np.float64)
            np.testing.assert_allclose(h, (x * (g * g)[:, None]).T @ x, rtol=1e-3, atol=1e-5)
            layer = inputs.layer_hessian(projection)
            total = sum(inputs.hessians(projection, [e])[0] for e in range(inputs.count))
            np.testing.assert_allclose(layer * (inputs.gates**2).sum(), total, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(inputs.gates.sum(axis=-1), 1, rtol=1e-4)


def test_the_last_projection_makes_up_for_the_rounding_of_the_others(
    tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64: what it makes of its disturbed inputs is nearer to the truth than without looking at them.

    Experts of a projection have two widths, which are quantized one after the other.
    """
    checkpoint = open_checkpoint(tiny)
    windows = calibration.windows_of(corpus.read(text), checkpoint, CONTEXT, 20, 3)
    monkeypatch.setattr(routed, "PIECE", 50)
    inputs = next(calibration.expert_inputs(checkpoint, windows))
    guide = Guide("gptq", None, windows, calibration.expert_inputs(checkpoint, windows))
    guide.approach(inputs.path)
    every = list(range(inputs.count))
    widths = {"gate_proj": {2: every[1::2], 3: every[::2]}, "up_proj": {2: every},
              "down_proj": {6: every[::3], 5: [e for e in every if e % 3]}}  # fmt: skip
    w = {name: inputs.module[name]["weight"] for name in ("gate_proj", "up_proj", "down_proj")}
    exact = {name: np.array(x.astype(mx.float32)).astype(np.float64) for name, x in w.items()}
    decoded = {name: np.empty_like(x) for name, x in exact.items()}
    for name, by_bits in widths.items():
        for bits, some in by_bits.items():
            parts = guide.quantize(f"{inputs.path}.{name}", w[name], Encoding("affine", "bf16", bits, 32), some)
            wide = [parts[0], *(p.astype(mx.float32) for p in parts[1:] if p is not None)]
            decoded[name][some] = np.array(mx.dequantize(*wide, group_size=32, bits=bits)).astype(np.float64)
    left = {"exact": 0.0, "fitted": 0.0}
    for expert in range(inputs.count):
        tokens, gates = inputs.rows(expert)
        x = np.array(inputs.x.rows(tokens)).astype(np.float64)

        def hidden(v: dict[str, np.ndarray], x: np.ndarray = x, expert: int = expert) -> np.ndarray:
            a = x @ v["gate_proj"][expert].T
            return a / (1 + np.exp(-a)) * (x @ v["up_proj"][expert].T)

        y, disturbed = (hidden(v) * gates[:, None] for v in (exact, decoded))
        if expert < 4:
            h, pull = inputs.disturbed([expert], with_stored(inputs.module, guide._stored))
            np.testing.assert_allclose(h[0], disturbed.T @ disturbed, rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(pull[0], (y - disturbed).T @ disturbed, rtol=1e-3, atol=1e-5)
        wanted = y @ exact["down_proj"][expert].T
        for key, last in (("exact", exact), ("fitted", decoded)):
            left[key] += ((disturbed @ last["down_proj"][expert].T - wanted) ** 2).sum()
    assert left["fitted"] < 0.8 * left["exact"]


def test_gptq_serves_tensors_in_constant_use(tiny: Path, text: Path, statistics: Statistics) -> None:
    weights: dict[str, mx.array] = {}
    for shard in open_checkpoint(tiny).shards:
        weights |= mx.load(str(shard))
    path, encoding = "model.layers.1.self_attn.k_proj", Encoding("affine", "bf16", 3, 64)
    w, h = weights[f"{path}.weight"], statistics.hessian(path)
    assert h is not None
    left = {}
    for method in ("mse", "gptq"):
        codes, scales, biases = Guide(method, statistics).quantize(path, w, encoding)
        assert scales is not None
        decoded = mx.dequantize(codes, scales, biases, group_size=64, bits=3)
        d = np.array(decoded.astype(mx.float32) - w.astype(mx.float32)).astype(np.float64)
        left[method] = np.einsum("oi,ij,oj->", d, h.astype(np.float64), d)
    assert left["gptq"] < 0.7 * left["mse"]


def test_products_stop_where_there_is_no_room(tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "PRODUCT_BYTES", 3 * 4 * 128 * 128)
    found = calibrate(open_checkpoint(tiny), corpus.read(text), context=CONTEXT, count=COUNT, seed=3)
    assert list(found.products) == [f"model.layers.0.{p}" for p in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate")]
    assert found.hessian("model.layers.0.self_attn.v_proj") is not None
    assert found.hessian("model.layers.1.self_attn.v_proj") is None


def test_statistics_are_the_same_again_and_through_a_file(
    tiny: Path, text: Path, statistics: Statistics, tmp_path: Path
) -> None:
    again = calibrate(open_checkpoint(tiny), corpus.read(text), context=CONTEXT, count=COUNT, seed=3)
    assert again.digest() == statistics.digest()
    statistics.save(tmp_path / "s.npz")
    assert Statistics.load(tmp_path / "s.npz").digest() == statistics.digest()
    other = calibrate(open_checkpoint(tiny), corpus.read(text), context=CONTEXT, count=COUNT, seed=4)
    assert other.digest() != statistics.digest()
    (tmp_path / "s.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(SourceError, match="no calibration statistics"):
        Statistics.load(tmp_path / "s.npz")


def test_text_and_statistics_make_a_file_with_provenance(
    tiny: Path, text: Path, tmp_path: Path, cli: CommandLine
) -> None:
    options = ["--calibration", text, "--windows", "4", "--context", "24", "--recipe", "int2", "--quantizer", "mse"]
    kept = tmp_path / "s.npz"
    cli("compress", tiny, "-o", tmp_path / "a", *options, "--statistics", kept).success()
    again = cli("compress", tiny, "-o", tmp_path / "b", "--recipe", "int2", "--statistics", kept).success()
    assert again.out
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    cli("compress", tiny, "-o", tmp_path / "c", "--recipe", "int2").success()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()
    with squizd.open(tmp_path / "a") as f:
        found = f.metadata["provenance"]["calibration"]
    read = corpus.read(text)
    assert (found["sha256"], found["size"], found["windows"]) == (read.sha256, read.size, 4)
    assert squizd.validate(tmp_path / "a", deep=True).ok
    other = tmp_path / "other.txt"
    other.write_text("Something else entirely, again and again. " * 30)
    refused = cli("compress", tiny, "-o", tmp_path / "d", *options, "--calibration", other, "--statistics", kept)
    assert "made from other text" in refused.failure()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00binary", b"Too few words.", b'{"text": 1}'])
@pytest.mark.parametrize("quantizer", ["mse", "gptq"])
def test_bad_text_is_a_clear_error_and_nothing_is_written(
    content: bytes, quantizer: str, tiny: Path, tmp_path: Path, cli: CommandLine
) -> None:
    path = tmp_path / ("x.jsonl" if content.startswith(b"{") else "x.txt")
    path.write_bytes(content)
    outcome = cli("compress", tiny, "-o", tmp_path / "out", "--calibration", path, "--quantizer", quantizer,
                  "--statistics", tmp_path / "s")  # fmt: skip
    assert path.name in outcome.failure()
    assert list(tmp_path.iterdir()) == [path]


def test_statistics_of_an_earlier_version_are_refused(statistics: Statistics, tmp_path: Path) -> None:
    statistics.save(tmp_path / "now")
    with np.load(tmp_path / "now") as z:
        np.savez(tmp_path / "then.npz", **{name: z[name] for name in z.files if not name.startswith("squares")})
    with pytest.raises(SourceError, match="earlier version's statistics") as caught:
        Statistics.load(tmp_path / "then.npz")
    assert "delete it" in caught.value.hint


def test_other_windows_are_other_knowledge(tiny: Path, text: Path, tmp_path: Path) -> None:
    """gptq looks at the windows themselves, whatever statistics were saved of: a run of others must not go on."""
    digests = {
        prepare(open_checkpoint(tiny), "gptq", Calibration(text, windows, CONTEXT), tmp_path / "s").digest()
        for windows in (2, 3, 2)
    }
    assert len(digests) == 2


def test_what_does_not_go_together(tiny: Path, text: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"quantizer": "gptq"}, "needs calibration text"),
        ({"quantizer": "minmax", "calibration": text}, "no use for calibration"),
        ({"target_bpw": 4.0}, "needs calibration text"),
        ({"target_bpw": 4.0, "plan": "x", "calibration": text}, "contradict"),
    ):
        with pytest.raises(RecipeError, match=message):
            squizd.compress(tiny, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_gptq_killed_between_records_resumes_to_the_same_bytes(tiny: Path, text: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    options: dict[str, Any] = {"quantizer": "gptq", "recipe": "int3", "calibration": Calibration(text, 4, 24)}
    whole = squizd.compress(tiny, tmp_path / "whole", **options)
    assert whole.resumed == 0
    for share in (0.1, 0.95):

        def progress(done: int, total: int, share: float = share) -> None:
            if done >= share * total:
                raise Stop

        with pytest.raises(Stop):
            squizd.compress(tiny, tmp_path / "x", progress=progress, **options)
    resumed = squizd.compress(tiny, tmp_path / "x", **options)
    assert resumed.resumed > 0
    assert (tmp_path / "x").read_bytes() == (tmp_path / "whole").read_bytes()
    with squizd.open(tmp_path / "x") as f:
        assert json.loads(json.dumps(f.metadata["recipe"]))["quantizer"] == "gptq"


def test_killed_while_it_calibrates_plans_or_writes_a_run_learns_nothing_twice(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def stop_at(layer: int | None, share: float | None) -> dict[str, Any]:
        def preparing(done: int, total: int) -> None:
            seen.append(done)
            if done == layer:
                raise Stop

        def progress(done: int, total: int) -> None:
            if share is not None and done >= share * total:
                raise Stop

        return {"preparing": preparing, "progress": progress}

    options: dict[str, Any] = {"quantizer": "gptq", "target_bpw": 4.2, "calibration": Calibration(text, 4, 24)}
    seen = list[int]()
    with pytest.raises(Stop):
        squizd.compress(tiny, tmp_path / "x", **options, **stop_at(2, None))
    with pytest.raises(Stop):  # calibrates anew, and writes some
        squizd.compress(tiny, tmp_path / "x", **options, **stop_at(None, 0.5))
    prepared = len(seen) - 2
    found = next((tmp_path / "x.work").glob("statistics-*"))
    (tmp_path / "x.work" / "plan-of-another-run").write_text("{")
    seen.clear()
    resumed = squizd.compress(tiny, tmp_path / "x", **options, **stop_at(None, None))
    assert (seen, resumed.resumed > 0) == ([], True)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    # a run that nobody stops; what went down half written is not taken for statistics
    (tmp_path / "y.work").mkdir()
    (tmp_path / "y.work" / found.name).write_bytes(b"PK")
    squizd.compress(tiny, tmp_path / "y", **options, **stop_at(None, None))
    assert len(seen) == prepared
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "y"]
