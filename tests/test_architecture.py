"""What is found in mlx-lm's models, and how an unknown one fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import squizd
from squizd.architecture import build, expert_modules, layer_ids
from squizd.errors import SourceError


@pytest.fixture
def config(tiny: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((tiny / "config.json").read_text("utf-8"))
    return loaded


@pytest.mark.parametrize("model_type", ["no_such_model", "switch_layers", "cache", ""])
def test_unknown_architectures_are_source_errors(config: dict[str, Any], model_type: str) -> None:
    with pytest.raises(SourceError, match="here"):
        build({**config, "model_type": model_type}, "here")


def test_a_config_that_does_not_fit_is_a_source_error(config: dict[str, Any]) -> None:
    del config["hidden_size"]
    with pytest.raises(SourceError, match="cannot build qwen3_moe"):
        build(config, "here")


def test_code_that_comes_with_a_model_is_never_run(config: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match="never does"):
        build({**config, "model_file": "model.py"}, "here")


def test_experts_are_found_by_type_in_model_order(config: dict[str, Any]) -> None:
    model = build(config, "here")
    assert list(expert_modules(model)) == [f"model.layers.{i}.mlp.switch_mlp" for i in range(4)]


@pytest.mark.parametrize(
    ("paths", "ids"),
    [
        (["model.layers.3.mlp.experts", "model.layers.7.mlp.experts"], [3, 7]),
        (["blocks.0.experts", "blocks.1.experts"], [0, 1]),
        (["layers.1.a.experts", "layers.1.b.experts"], [0, 1]),
        ([], []),
    ],
)
def test_layer_ids(paths: list[str], ids: list[int]) -> None:
    assert layer_ids(paths) == ids


def test_infinity_in_a_config_survives(checkpoint: Path, tmp_path: Path) -> None:
    """Published hybrid models have it, as mlx-lm's tag or as the word that JSON does not know."""
    path = checkpoint / "config.json"
    plain = squizd.compress(checkpoint, tmp_path / "plain.squizd", recipe="keep").path
    for number, value in enumerate(("Infinity", '{"__float__": "Infinity"}')):
        config = json.loads(path.read_text("utf-8")) | {"time_step_limit": [0.0, 0]}
        path.write_text(json.dumps(config).replace("[0.0, 0]", f"[0.0, {value}]"), "utf-8")
        out = squizd.compress(checkpoint, tmp_path / f"{number}.squizd", recipe="keep").path
        with squizd.open(out) as f:
            assert f.metadata["model"]["config"]["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
        ids = mx.array([[5, 6, 7]])
        assert mx.array_equal(squizd.load(out)[0](ids), squizd.load(plain)[0](ids))
