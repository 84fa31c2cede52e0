"""Routing recorded and profiled, against the routers' formulas and plain counting; and what a profile is used for."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from test_runtime_models import CONFIGS, QWEN3, make_model, write_file

import squizd
from squizd import container, fitting, plotting, profiling, tracing
from squizd.errors import BudgetError, FormatError, RequestError, TextError
from squizd.repack import repack, same_payload
from squizd.runtime import warm
from squizd.runtime.budget import LayerDemand, by_need
from squizd.runtime.load import load_model, state
from squizd.runtime.policy import Recall
from squizd.runtime.profile import LayerProfile, read_profile
from squizd.runtime.simulation import decode_calls, replay
from squizd.runtime.switch import PagedSwitch

TEXTS = ["The city was founded in 1820.", "A river runs through it.\n\nThe war began in the spring of that year."]


@pytest.fixture
def file(tiny_file: Callable[..., Path], tmp_path: Path) -> Path:
    """The fixture's file, to change."""
    return Path(shutil.copy(tiny_file(), tmp_path / "m.squizd"))


@pytest.fixture(scope="module")
def profiled(tiny_file: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a profile of some text. Never write to it."""
    out = tmp_path_factory.mktemp("profiled") / "m.squizd"
    profiling.profile(tiny_file(), Path(__file__).parent.parent / "fixtures" / "tiny-moe" / "README.md", out)
    return out


# -- traces ----------------------------------------------------------------------------------------------


def routed(model: Any, ids: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each Qwen3 block: its router's choice and weights, by the formula, on the inputs that it gets."""
    inputs: list[mx.array] = []
    blocks = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "switch_mlp")]
    kind = type(blocks[0])

    class Seen(kind):  # type: ignore[misc, valid-type]
        def __call__(self, x: mx.array) -> mx.array:
            inputs.append(x)
            return kind.__call__(self, x)

    for block in blocks:
        block.__class__ = Seen
    model(mx.array([ids]))
    found = []
    for block, x in zip(blocks, inputs, strict=True):
        block.__class__ = kind
        scores = np.array(mx.softmax(block.gate(x)[0].astype(mx.float32), axis=-1))
        chosen = np.sort(np.argsort(-scores, axis=-1)[:, : block.top_k], axis=-1)
        weights = np.take_along_axis(scores, chosen, -1)
        found.append((chosen, weights / weights.sum(-1, keepdims=True) if block.norm_topk_prob else weights))
    return found


def in_order(experts: np.ndarray, gates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(experts, axis=-1)
    return np.take_along_axis(experts, order, -1), np.take_along_axis(gates, order, -1)


@pytest.mark.parametrize("share", ["100%", "50%", "0%"])
def test_a_trace_is_what_the_routers_compute(tiny_file: Callable[..., Path], share: str) -> None:
    ids = np.random.default_rng(0).integers(0, 2000, 37).tolist()
    wanted = routed(load_model(tiny_file(), context=64), ids)
    model = load_model(tiny_file(), resident=share, context=64)
    for chunk in (37, 9, 1):
        (parts,) = tracing.trace(model, [ids], chunk=chunk)
        assert len(parts) == -(-37 // chunk)
        routing = tracing.join(parts)
        assert routing.tokens == 37
        for experts, gates, (chosen, weights) in zip(routing.experts, routing.gates, wanted, strict=True):
            assert gates is not None
            got = in_order(experts, gates)
            np.testing.assert_array_equal(got[0], chosen)
            np.testing.assert_allclose(got[1], weights, atol=2e-5)


def test_recording_changes_no_logits_and_leaves_no_trace(tiny_file: Callable[..., Path]) -> None:
    """Also with a model that replays single tokens already: recorded, it does not."""
    model: Any = load_model(tiny_file(), resident="50%", context=64)
    kinds = [type(m) for m in model.modules()]

    def answers() -> list[np.ndarray]:
        cache = make_prompt_cache(model)
        return [np.array(model(mx.array([part]), cache=cache)) for part in ([1, 2, 3], [4], [5], [6])]

    before = answers()
    with tracing.recording(model) as taps:
        during = answers()
        assert [len(tap.indices) for tap in taps] == [4] * 4
    assert [type(m) for m in model.modules()] == kinds
    for found in (during, answers()):
        for a, b in zip(found, before, strict=True):
            np.testing.assert_array_equal(a, b)
    assert [len(tap.indices) for tap in taps] == [4] * 4


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "llama"])
def test_any_architecture_can_be_traced(name: str, tmp_path: Path) -> None:
    """With shared experts, latent attention, Mamba, additive biases: choices everywhere, and gate weights."""
    file = write_file(tmp_path / "m.squizd", make_model(CONFIGS[name]), CONFIGS[name])
    model = load_model(file, resident="50%", context=64)
    (parts,) = tracing.trace(model, [list(range(20))], chunk=8)
    routing = tracing.join(parts)
    assert len(routing.experts) == len(state(model).file.moe_layers)
    for experts, gates in zip(routing.experts, routing.gates, strict=True):
        assert experts.shape == (20, 2)
        assert experts.max() < 8
        assert (experts[:, 0] != experts[:, 1]).all()
        assert gates is not None
        assert gates.shape == (20, 2)
        assert (gates > 0).all()
        assert gates.sum(1).max() < 1.002
        assert gates.sum(1).min() > 0.998 or name == "qwen2_moe"  # which does not scale them to 1


def test_gates_that_cannot_be_seen_are_none(tmp_path: Path) -> None:
    """A block that does more to the experts' answers than to weigh them."""
    model: Any = load_model(write_file(tmp_path / "m.squizd", make_model(QWEN3), QWEN3), context=64)
    block = model.model.layers[0].mlp
    kind = type(block)

    class Mixed(kind):  # type: ignore[misc, valid-type]
        def __call__(self, x: mx.array) -> mx.array:
            return mx.cumsum(kind.__call__(self, x), axis=-1)

    block.__class__ = Mixed
    (parts,) = tracing.trace(model, [[1, 2, 3]])
    first, second = parts[0].gates
    assert first is None
    assert second is not None
    assert parts[0].experts[0].shape == (3, 2)


# -- the appendix ----------------------------------------------------------------------------------------


def test_a_profile_counts_what_the_routers_chose(file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"domain": "x", "text": t}) + "\n" for t in TEXTS) + "\n")
    seen: list[tuple[int, int]] = []
    before = container.open(file)
    summary = profiling.profile(file, text, progress=lambda done, total: seen.append((done, total)))
    assert squizd.validate(file, deep=True).ok
    with container.open(file) as f:
        assert same_payload(before, f)
        header, *lines = f.appendix(b"PROF")
    before.close()
    model, tokenizer = squizd.load(file, context=64)
    ids = [list(tokenizer.encode(t)) for t in TEXTS]
    assert header["tokens"] == summary.tokens == sum(map(len, ids)) == seen[-1][0]
    assert header["text_sha256"] == hashlib.sha256("".join(TEXTS).encode()).hexdigest()
    assert (summary.texts, summary.layers, summary.unobserved) == (2, 4, 0)
    both = [routed(model, part) for part in ids]
    for i, line in enumerate(lines):
        chosen = np.concatenate([one[i][0] for one in both])
        weights = np.concatenate([one[i][1] for one in both])
        assert line["layer"] == i
        assert line["counts"] == [int((chosen == e).sum()) for e in range(32)]
        np.testing.assert_allclose(line["gate_mass"], [weights[chosen == e].sum() for e in range(32)], atol=1e-3)
        pairs = Counter(pair for token in chosen.tolist() for pair in combinations(token, 2))
        assert line["coactivation"] == [[a, b, n] for (a, b), n in sorted(pairs.items())]
        for slots, hits in line["hits_by_slots"]:
            assert hits >= replay(Recall(32), decode_calls(chosen), slots).hits
        assert line["hits_by_slots"][0][0] == 4
        assert line["hits_by_slots"][-1] == [32, 4 * len(chosen) - len(np.unique(chosen))]
    again = file.read_bytes()
    profiling.profile(file, text)
    assert file.read_bytes() == again


def test_tokens_are_counted_up_to_the_limit_and_in_windows(file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "b.txt").write_text(TEXTS[1])
    (tmp_path / "texts" / "a.md").write_text(TEXTS[0])
    monkeypatch.setattr(profiling, "WINDOW", 5)
    out = tmp_path / "out.squizd"
    summary = profiling.profile(file, tmp_path / "texts", out, tokens=13)
    assert (summary.tokens, summary.path) == (13, str(out))
    with container.open(out) as f, container.open(file) as source:
        assert f.appendix(b"PROF")[0]["tokens"] == 13
        assert not source.appendix(b"PROF")
        assert same_payload(f, source)


def test_passages_come_from_all_texts() -> None:
    texts = ["abcdefgh" * 100, "0123" * 50, "xyz"] + ["m" * 40] * 5
    encode = lambda text: [ord(c) for c in text]  # noqa: E731
    few = list(profiling._passages(texts, encode, 300, 64))
    assert sum(len(part) for _, part in few) == 300
    assert sorted({index for index, _ in few}) == list(range(8))
    everything = list(profiling._passages(texts, encode, 10**6, 64))
    for i, text in enumerate(texts):
        assert "".join(chr(c) for index, part in everything for c in part if index == i) == text
    assert max(len(part) for _, part in everything) == 64
    many = [index for index, _ in profiling._passages(["m" * 600] * 100, encode, 512 * 10, 1024)]
    assert len(many) == 10
    assert max(b - a for a, b in pairwise([0, *sorted(many), 100])) < 25
    assert list(profiling._passages([], encode, 10, 64)) == []


def test_texts_that_are_none(file: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"words": 1}\n')
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    for name, message in (("broken.jsonl", "line 2"), ("empty.txt", "is empty"), ("bytes.txt", "is not text")):
        with pytest.raises(TextError, match=message):
            profiling.profile(file, tmp_path / name)
    with pytest.raises(RequestError, match="0 tokens"):
        profiling.profile(file, tmp_path / "broken.jsonl", tokens=0)


def test_a_model_without_experts_has_no_profile(tmp_path: Path, tiny_file: Callable[..., Path]) -> None:
    dense = write_file(tmp_path / "m.squizd", make_model(CONFIGS["llama"]), CONFIGS["llama"])
    with pytest.raises(RequestError, match="no experts"):
        fitting.fit(dense, measure=False)


def test_a_profile_of_other_shape_is_refused_and_of_another_version_ignored(file: Path, tmp_path: Path) -> None:
    bad, new = tmp_path / "bad.squizd", tmp_path / "new.squizd"
    header = {"appendix": "profile", "version": 1, "tokens": 3, "text_sha256": "0" * 64}
    repack(file, bad, add={"PROF": json.dumps(header).encode() + b"\n"})
    with pytest.raises(FormatError, match="profile cannot be read"):
        load_model(bad, resident="50%")
    worn = [{"layer": i, "counts": [4] * 32, "gate_mass": [1.0] * 32} for i in range(4)]
    repack(file, new, add={"PROF": b"".join(json.dumps(x).encode() + b"\n" for x in [header, *worn])})
    with pytest.raises(FormatError, match="4 of 3 tokens") as caught:
        load_model(new)
    assert caught.value.code == "profile-count"
    new.unlink()
    repack(file, new, add={"PROF": json.dumps({**header, "version": 2}).encode() + b"\n"})
    with container.open(new) as f:
        assert read_profile(f) is None
    state(load_model(new, resident="50%")).close()


@pytest.mark.parametrize("value", [None, 3, [[1]], [[1, "x"]], [[4, 9], [3, 9]], [[4, 9], [8, 5]], [[0, 1]], [[4, 99]]])
def test_a_member_that_means_nothing_here_is_ignored(profiled: Path, tmp_path: Path, value: Any) -> None:
    with container.open(profiled) as f:
        header, *lines = f.appendix(b"PROF")
    changed = [{**line, "counts": [1] * 32, "coactivation": [], "hits_by_slots": value} for line in lines]
    for line in changed:
        line["gate_mass"] = [0.0] * 32
    out = tmp_path / "m.squizd"
    repack(profiled, out, add={"PROF": b"".join(json.dumps(x).encode() + b"\n" for x in [header, *changed])})
    with container.open(out) as f:
        found = read_profile(f)
    assert found is not None
    assert {x.measured for x in found.layers} == {()}


# -- what it is used for ---------------------------------------------------------------------------------


def test_expected_hits() -> None:
    counted = LayerProfile((1, 5, 0, 4))
    assert [counted.hits(n) for n in range(5)] == [0, 0.5, 0.9, 1.0, 1.0]
    assert counted.busiest(2) == [1, 3]
    assert counted.busiest(4) == [0, 1, 3]
    measured = LayerProfile((1, 5, 0, 4), ((1, 2), (3, 6)))
    assert [measured.hits(n) for n in range(5)] == [0, 0.2, 0.4, 0.6, 1.0]
    assert LayerProfile((0, 0)).hits(1) == 1.0


def test_slots_and_warm_start_follow_the_profile(profiled: Path, tiny_file: Callable[..., Path]) -> None:
    plain, model = (load_model(path, resident="50%", context=64) for path in (tiny_file(), profiled))
    budget, even = state(model).budget, state(plain).budget
    assert sum(even.slots) == sum(budget.slots)
    assert budget.total <= even.total
    with container.open(profiled) as f:
        profile = read_profile(f)
    assert profile is not None
    layers = [LayerDemand(32, 4, 100, p.curve()) for p in profile.layers]
    assert budget.slots == by_need(layers, even.slots, 100 * sum(even.slots))
    state(model)._pager.warmer.wait()  # type: ignore[union-attr]
    switches = [m for _, m in sorted(model.named_modules()) if isinstance(m, PagedSwitch)]
    for switch, layer, count in zip(switches, profile.layers, budget.slots, strict=True):
        assert sorted(switch.slots.slot_of) == layer.busiest(count)
        for expert, slot in switch.slots.slot_of.items():
            raw = bytes(state(model).file.read_expert(switch.slots.layer.layer, expert))
            assert any(bank[slot].tobytes() in raw for bank in switch.slots.banks)
    stats = state(model).stats
    assert (stats.hits, stats.misses, stats.bytes_read) == (0, 0, 0)
    assert stats.bytes_warmed > 0
    ids = mx.array([list(range(30))])
    np.testing.assert_array_equal(np.array(model(ids)), np.array(plain(ids)))
    assert state(model).stats.hits > 0


def test_a_warm_start_leaves_called_layers_alone_and_ends(profiled: Path, monkeypatch: Any) -> None:
    began: list[warm.Warmer] = []
    monkeypatch.setattr(warm.Warmer, "_run", lambda self: began.append(self))
    model: Any = load_model(profiled, resident="25%", context=64)
    mx.eval(model(mx.array([[1, 2]])))
    before = [dict(m.slots.slot_of) for m in model.modules() if isinstance(m, PagedSwitch)]
    monkeypatch.undo()
    began[0]._run()
    assert [m.slots.slot_of for m in model.modules() if isinstance(m, PagedSwitch)] == before
    assert state(model).stats.bytes_warmed == 0
    state(model).close()
    state(model).close()


def test_a_warm_start_survives_damage(profiled: Path, tmp_path: Path) -> None:
    """What the model does not ask for may be unreadable."""
    copy = Path(shutil.copy(profiled, tmp_path / "m.squizd"))
    with container.open(copy) as f:
        records = [f.expert(x.layer, e) for x in f.moe_layers for e in range(x.expert_count)]
    content = bytearray(copy.read_bytes())
    for record in records:
        content[record.offset] ^= 1
    copy.write_bytes(content)
    model = load_model(copy, resident="25%", context=64)
    state(model)._pager.warmer.wait()  # type: ignore[union-attr]
    with pytest.raises(squizd.SquizdError, match="digest"):
        mx.eval(model(mx.array([[1, 2]])))
    state(model).close()


def test_a_process_may_end_while_it_warms(profiled: Path) -> None:
    code = (
        "import sys, time, squizd.runtime.io as io\n"
        "from squizd.runtime import load, pager\n"
        "pager.INLINE_BYTES = 0\n"
        "read = io.Scatter.read\n"
        "def slow(*args):\n"
        "    read(*args)\n"
        "    time.sleep(0.02 if warming else 0)\n"
        "io.Scatter.read, warming = slow, False\n"
        "model = load.load_model(sys.argv[1], resident='50%')\n"
        "warming = True\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(profiled)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# -- fit -------------------------------------------------------------------------------------------------


def test_fit_predicts_from_what_it_has(profiled: Path, tiny_file: Callable[..., Path], tmp_path: Path) -> None:
    even = fitting.fit(tiny_file(), context=64, measure=False)
    assert even.source == "uniform"
    assert [r.hit_rate for r in even.rows] == pytest.approx([r.resident_share for r in even.rows])
    assert even.rows[0].resident_share == 1
    assert even.rows[-1].slots == (4, 4, 4, 4)
    memories = [r.memory for r in even.rows]
    assert memories == sorted(memories, reverse=True)
    whole = 4 * 4 * even.expert_bytes  # four experts in each of four layers
    assert even.rows[-1].bytes_per_token == pytest.approx(whole * (1 - 4 / 32), rel=0.01)
    known = fitting.fit(profiled, context=64, measure=False)
    assert known.source == "measured"
    assert all(a.hit_rate >= b.hit_rate for a, b in zip(known.rows, known.rows[1:], strict=False))
    assert known.rows[2].hit_rate > even.rows[2].hit_rate
    for row in known.rows:  # the budget does what it says
        model = load_model(profiled, memory=row.memory, context=64)
        assert state(model).budget.total <= row.memory
        assert sum(state(model).budget.slots) >= sum(row.slots)
        state(model).close()
    with container.open(profiled) as f:
        header, *lines = f.appendix(b"PROF")
    bare = [{k: v for k, v in line.items() if k != "hits_by_slots"} for line in lines]
    other = tmp_path / "m.squizd"
    repack(profiled, other, add={"PROF": b"".join(json.dumps(x).encode() + b"\n" for x in [header, *bare])})
    assert fitting.fit(other, context=64, measure=False).source == "counts"
    with pytest.raises(BudgetError):
        fitting.fit(profiled, memory=["1kB"], measure=False)


def test_fit_and_profile_on_the_command_line(cli: Any, file: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXTS[1])
    done = cli("profile", file, "--text", tmp_path / "text.txt", "--json").success()
    assert json.loads(done.out)["layers"] == 4
    assert "expert layers" in cli("profile", file, "--text", tmp_path / "text.txt").success().out
    done = cli("fit", file, "--context", 64, "--json", "--plot", tmp_path / "p.svg").success()
    found = json.loads(done.out)
    assert found["source"] == "measured"
    assert all(row["tokens_per_second_warm"] > 0 for row in found["rows"])
    svg = (tmp_path / "p.svg").read_text()
    assert svg.startswith("<svg ")
    assert svg.count("<polyline") == 3
    assert "href" not in svg
    done = cli("fit", file, "--no-measure", "--context", 64, "--memory", "1GB", "--plot", tmp_path / "p.html").success()
    assert len(done.out.splitlines()) == 2
    assert "<svg " in (tmp_path / "p.html").read_text()
    assert "no name for a plot" in cli("fit", file, "--plot", tmp_path / "p.png").failure()
    assert "line 1" in cli("profile", file, "--text", make_rows(tmp_path)).failure()
    assert "exists" in cli("profile", file, "--text", tmp_path / "text.txt", "-o", tmp_path / "p.svg").failure()


def make_rows(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("[1]\n")
    return path


def test_a_plot_escapes_names(profiled: Path) -> None:
    found = fitting.fit(profiled, context=64, measure=False)
    drawn = plotting.draw(fitting.Fit(**{**found.__dict__, "path": "<a&b>"}))
    assert "&lt;a&amp;b&gt;" in drawn
    assert drawn.count("<polyline") == 1
