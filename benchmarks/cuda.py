"""Decode on an NVIDIA GPU: mlx-lm's own model, and squizd with all, half and a quarter of the experts resident.

    python tools/make_synthetic.py big.squizd --like qwen3-30b-a3b
    python benchmarks/cuda.py big.squizd [--trace routes.npy] [--tokens 60] [--rounds 5]

Weights are random, so routing would be uniform: expert choices come from a recorded trace of a real model
(`--trace`: uint8 [tokens, layers, k], expert ids below half of this model's experts; two of its layers make one
here), or without one from a Zipf law. All sides use the same choices. Each share is loaded in turn; medians of
rounds. The logits of every share must equal those with all experts resident, bit for bit, or the run fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU

import squizd
from squizd.runtime.load import load_model, state
from squizd.runtime.switch import PagedSwitch


class Routed(nn.Module):
    """The experts that a trace names instead of the router's."""

    def __init__(self, inner: nn.Module, choices: np.ndarray) -> None:
        super().__init__()
        self.inner, self._choices, self.at = inner, [mx.array(c[None, None]) for c in choices], 0
        mx.eval(self._choices)

    def __call__(self, x: mx.array, indices: mx.array) -> Any:
        if indices.shape[1] > 1:  # a prompt: as the router says
            return self.inner(x, indices)
        chosen = self._choices[self.at % len(self._choices)]
        self.at += 1
        return self.inner(x, chosen + 0 * indices)  # still waits for the router, as a real model must


def choices(trace: np.ndarray | None, layers: int, experts: int, k: int, count: int = 4000) -> np.ndarray:
    """[layers, count, k] distinct expert ids."""
    if trace is not None:
        assert 2 * trace.shape[2] == k

        def lane(layer: int, shift: int) -> np.ndarray:
            return np.roll(trace[:, layer % trace.shape[1]], shift, axis=0)[:count].astype(np.uint32)

        return np.stack(
            [
                np.concatenate([lane(i, 97 * i), lane(i + 3, 131 * i + 41) + experts // 2], -1, dtype=np.uint32)
                for i in range(layers)
            ]
        )
    rng = np.random.default_rng(0)
    p = 1 / np.arange(1, experts + 1)
    noise = rng.gumbel(size=(layers, count, experts)) + np.log(p)
    return np.argsort(-noise, -1)[..., :k].astype(np.uint32)


def route(model: nn.Module, chosen: np.ndarray) -> list[Routed]:
    found = []
    for module in list(model.modules()):
        inner = getattr(module, "switch_mlp", None)
        if isinstance(inner, SwitchGLU | PagedSwitch):
            module.switch_mlp = Routed(inner, chosen[len(found)])
            found.append(module.switch_mlp)
    return found


def decode(model: nn.Module, routed: list[Routed], start: int, tokens: int) -> tuple[float, mx.array]:
    """Tokens a second and the last logits."""
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[11, 12, 13, 14]]), cache=cache))
    for r in routed:
        r.at = start
    y = mx.array([[7]])
    began = time.perf_counter()
    for _ in range(tokens):
        logits = model(y, cache=cache)
        y = mx.argmax(logits[:, -1], axis=-1, keepdims=True)
        mx.async_eval(y)
        y.item()
    return tokens / (time.perf_counter() - began), logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--trace")
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shares", default="100%,50%,25%")
    options = parser.parse_args()
    trace = np.load(options.trace) if options.trace else None
    with squizd.open(options.file) as f:
        config = f.metadata["model"]["config"]
    chosen = choices(trace, config["num_hidden_layers"], config["num_experts"], config["num_experts_per_tok"])
    result: dict[str, Any] = {"benchmark": "cuda", "device": str(mx.default_device()), "file": options.file}
    wanted: list[np.ndarray] = []
    for share in options.shares.split(","):
        began = time.perf_counter()
        model = load_model(options.file, resident=share)
        loaded = time.perf_counter() - began
        routed = route(model, chosen)
        decode(model, routed, 0, 150)  # kernels are compiled, slots fill
        rates, logits = [], []
        state(model).reset_stats()
        for i in range(options.rounds):
            rate, last = decode(model, routed, 150 + i * options.tokens, options.tokens)
            rates.append(rate)
            logits.append(np.array(last.astype(mx.float32)))
        if not wanted:
            wanted = logits
        same = all(np.array_equal(a, b) for a, b in zip(logits, wanted, strict=True))
        stats = state(model).stats
        rate = statistics.median(rates)
        result[share] = {
            "tokens_per_second": round(rate, 1),
            "load_seconds": round(loaded, 1),
            "hit_rate": round(stats.hit_rate, 3),
            "gigabytes_read_per_token": round(stats.bytes_read / 1e9 / options.rounds / options.tokens, 3),
            "read_seconds_per_token": round(stats.read_seconds / options.rounds / options.tokens, 4),
            "same_bits": same,
        }
        print(share, result[share], flush=True)
        del model, routed
        gc.collect()
        mx.clear_cache()
    print(json.dumps(result))
    if not all(result[share]["same_bits"] for share in options.shares.split(",")):
        sys.exit("the logits differ")


if __name__ == "__main__":
    main()
