"""`squizd bench`: its figures by hand, its rival against mlx-lm's own conversion, its verdict and exit codes."""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

import squizd
from squizd import kernels, measuring
from squizd.errors import BudgetError, RequestError
from squizd.kernels import layers
from squizd.sides import CHECKED_TOKENS, Side, Trial, _MlxSide
from squizd.trials import Process, ratios, summary

PROMPT = [5, 17, 99, 3, 250, 41]


def test_figures_are_what_their_definitions_say() -> None:
    """Two trials of three tokens: gaps of 1, 3, 1 and 1 seconds, rates 2 / 4 and 2 / 2."""
    trials = [Trial([2.0, 3.0, 6.0], 6, 2, 800, 0.5, 70), Trial([1.0, 2.0, 3.0], 8, 0, 0, 0.0, 90)]
    found = summary(trials)
    assert found["ttft_seconds"] == pytest.approx({"p50": 1.5, "p95": 1.95, "p99": 1.99})
    assert found["token_seconds"] == pytest.approx({"p50": 1.0, "p95": 1 + 2 * 0.85, "p99": 1 + 2 * 0.97})
    assert found["tokens_per_second"] == pytest.approx({"p50": 0.75, "p95": 0.525, "p99": 0.505})
    assert (found["hit_rate"], found["bytes_read_per_trial"], found["bytes_read_per_token"]) == (14 / 16, 400, 133)
    assert (found["disk_bytes_per_second"], found["peak_rss"], found["trials"]) == (1600.0, 90, 2)
    plain = summary([Trial([1.0, 2.0])])
    assert plain["hit_rate"] is plain["disk_bytes_per_second"] is None
    other = [Trial([4.0, 5.0, 6.0]), Trial([4.0, 5.0, 6.0])]
    both = ratios(trials, other, lambda t: t.seconds[0])
    assert both == pytest.approx({"median": 0.375, "p25": 0.3125, "p75": 0.4375, "min": 0.25, "max": 0.5})


def test_the_rival_is_mlx_lm_on_the_same_weights(tiny_file: Any, tiny: Path, tmp_path: Path) -> None:
    """Loaded from the file, in its number types: the logits of mlx-lm's own conversion, bit for bit."""
    folder = tmp_path / "mlx"
    mlx_lm.convert(hf_path=str(tiny), mlx_path=str(folder), quantize=True)
    theirs = mlx_lm.load(str(folder))[0]
    with layers.switched_off():
        side = _MlxSide(Side("mlx-lm", "mlx-lm", str(tiny_file()), context=64))
        ids = mx.array([PROMPT])
        got, want = (np.array(m(ids).astype(mx.float32)) for m in (side.model, theirs))
        assert side.facts()["floats"] == ["bfloat16"]
        assert side.state.paged_layers == 0
        digest = side.digest(PROMPT, 4)
    np.testing.assert_array_equal(got, want)
    assert len(digest["tokens"]) == CHECKED_TOKENS
    assert side.trial(PROMPT, 3).hits == 0


def test_a_digest_is_that_of_the_logits_and_sees_every_bit(tiny_file: Any) -> None:
    path = str(tiny_file())
    model: Any = squizd.load(path, resident="100%")[0]
    cache = squizd.runtime.load.state(model).caches.make(model)  # type: ignore[attr-defined]
    out, digest = model(mx.array([PROMPT]), cache=cache), hashlib.sha256()
    for _ in range(CHECKED_TOKENS):
        digest.update(np.array(out).tobytes())
        out = model(mx.array([[int(np.array(out)[0, -1].argmax())]]), cache=cache)
    digest.update(np.array(out).tobytes())
    ours = Side("squizd", "squizd", path, resident="0%", context=64, kernels=not kernels.missing())
    with Process(ours) as process:
        found = process.ask(do="digest", prompt=PROMPT, chunk=len(PROMPT))
        assert found["misses"] > 0
        assert found["sha256"] == digest.hexdigest()
    if not kernels.missing():
        with Process(Side("squizd", "squizd", path, resident="0%", context=64, kernels=False)) as process:
            other = process.ask(do="digest", prompt=PROMPT, chunk=len(PROMPT))
        assert other["tokens"] == found["tokens"]
        assert other["sha256"] != found["sha256"]  # sums in another order


def test_a_bench_beside_mlx_lm(tiny_file: Any, cli: Any) -> None:
    file, options = tiny_file(), ("--resident", "25%", "--trials", "2", "--tokens", "6")
    found = json.loads(cli("bench", file, *options, "--against", "mlx-lm-f32", "--json").success().out)
    assert found["exact"]["same"] is True
    assert found["file_id"] == json.loads(cli("inspect", file, "--json").success().out)["file_id"]
    ours, theirs = found["sides"]["squizd"], found["sides"]["mlx-lm-f32"]
    assert ours["trials"] == theirs["trials"] == 2
    assert theirs["hit_rate"] is None
    assert 0 < ours["hit_rate"] < 1
    assert ours["bytes_read_per_trial"] > 10_000
    assert ours["peak_rss"] > 30_000_000
    speed = found["ratios"]["mlx-lm-f32"]["tokens_per_second"]
    assert speed["min"] <= speed["p25"] <= speed["median"] <= speed["p75"] <= speed["max"]
    assert "95 % are no longer" in found["definitions"]


def test_other_bits_are_an_exit_code(tiny_file: Any, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "check", lambda *_: measuring.Exactness(False, "tokens [1] and [2]", 31))
    done = cli("bench", tiny_file(), "--resident", "25%", "--trials", "1", "--tokens", "2")
    assert done.code == 1
    assert "31 rows of logits: NOT the bits of (tokens [1] and [2]) a resident model's" in done.out
    assert done.out.startswith("side ")


def test_what_cannot_be_run_is_one_line(tiny_file: Any, cli: Any, tmp_path: Path) -> None:
    assert "at least" in cli("bench", tiny_file(), "--memory", "1MB").failure()
    assert "No such file" in cli("bench", tmp_path / "none.squizd").failure()
    assert "needs a GGUF file" in cli("bench", tiny_file(), "--against", "llama.cpp").failure()
    if find_spec("llama_cpp") is None:
        said = cli("bench", tiny_file(), "--against", "llama.cpp", "--gguf", "m.gguf").failure()
        assert "pip install llama-cpp-python" in said
    with pytest.raises(BudgetError) as caught:
        squizd.bench(tiny_file(), memory="1MB")
    assert caught.value.minimum > 10**6
    with pytest.raises(RequestError, match="no comparison with ollama"):
        squizd.bench(tiny_file(), against=["ollama"])
