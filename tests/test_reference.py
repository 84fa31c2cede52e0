"""The fixture's logits against transformers', which share no code with mlx-lm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import squizd


@pytest.mark.parametrize("resident", ["100%", "25%"])
def test_keep_matches_transformers_in_float32(tiny: Path, tiny_file: Callable[..., Path], resident: str) -> None:
    """`reference_logits.npz` holds transformers' float32 logits of the last four positions of three prompts."""
    model, _ = squizd.load(tiny_file(recipe="keep"), resident=resident)
    reference = np.load(tiny / "reference_logits.npz")
    prompts = sorted(name for name in reference if name.startswith("ids_"))
    assert len(prompts) == 3
    for name in prompts:
        wanted = reference[name.replace("ids", "logits")]
        found = np.array(model(mx.array(reference[name])[None])[0, -len(wanted) :])
        assert np.abs(found - wanted).max() <= 1e-3 * np.abs(wanted).max()


def test_quantized_stays_close_to_the_original(tiny: Path, tiny_file: Callable[..., Path]) -> None:
    """8 bits hardly change the prediction, 2 bits do: quantization is really there, and of the right size."""
    reference = np.load(tiny / "reference_logits.npz")
    ids, wanted = mx.array(reference["ids_2"])[None], reference["logits_2"]
    distance = {}
    for recipe in ("int8", "int4", "int2"):
        model, _ = squizd.load(tiny_file(recipe=recipe))
        found = np.array(model(ids)[0, -len(wanted) :])
        p, q = (np.exp(x - np.logaddexp.reduce(x, axis=-1, keepdims=True)) for x in (wanted, found))
        distance[recipe] = float((p * np.log(p / q)).sum(-1).mean())
    assert distance["int8"] < 0.01 < distance["int2"]
    assert distance["int8"] < distance["int4"] < distance["int2"]
