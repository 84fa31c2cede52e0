"""Decode and first token on an NVIDIA GPU: mlx-lm, and squizd with all, half and a quarter of the experts resident.

    python tools/make_synthetic.py big.squizd --like qwen3-30b-a3b
    python benchmarks/trace.py SMALL.squizd --text eval.jsonl routes.npy
    python benchmarks/cuda.py big.squizd --trace routes.npy [--mlx FOLDER] [--tokens 60] [--rounds 5] [--starts 3]

`--mlx`: where to write the same weights as an MLX checkpoint, unless it is there, and compare with mlx-lm.

Weights are random, so routing would be uniform: expert choices come from a recorded trace of a real model
(`--trace`: uint8 [tokens, layers, k], expert ids below half of this model's experts; two of its layers make one
here), or without one from a Zipf law. All sides use the same choices. Each side is a process; medians of rounds. The
logits of every share must equal those with all experts resident, bit for bit, or the run fails. First tokens are timed
from the call that loads to the answer to a prompt of 32 tokens, in turns, once all else ran (so that kernels are
compiled, and both files are in the page cache): in a fresh process, and a second time in that process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.utils
import numpy as np
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU

import squizd
from squizd.runtime import device
from squizd.runtime.load import load_model, state
from squizd.runtime.switch import PagedSwitch


class Routed(nn.Module):
    """The experts that a trace names instead of the router's."""

    def __init__(self, inner: nn.Module, choices: np.ndarray) -> None:
        super().__init__()
        self.inner, self._choices, self.at = inner, [mx.array(c[None, None]) for c in choices], 0
        mx.eval(self._choices)  # `at` is set by whoever calls the model: a token may be computed twice

    def __call__(self, x: mx.array, indices: mx.array) -> Any:
        if indices.shape[1] > 1:  # a prompt: as the router says
            return self.inner(x, indices)
        chosen = self._choices[self.at % len(self._choices)]
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


MLX = "mlx-lm"
PROMPT = list(range(100, 132))


def decode(model: nn.Module, routed: list[Routed], start: int, tokens: int) -> tuple[list[float], mx.array]:
    """Seconds of each token, and the last logits; as in mlx-lm a graph is built while the one before is computed."""
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[11, 12, 13, 14]]), cache=cache))
    y = mx.array([[7]])
    times = [time.perf_counter()]
    for i in range(tokens):
        for r in routed:
            r.at = start + i
        logits = model(y, cache=cache)
        following = mx.argmax(logits[:, -1], axis=-1, keepdims=True)
        mx.async_eval(following)
        y.item()
        y = following
        times.append(time.perf_counter())
    mx.eval(y)
    times[-1] = time.perf_counter()
    return np.diff(times).tolist(), logits


def export(path: str, folder: Path) -> None:
    """The file's weights as a checkpoint that mlx-lm loads."""
    device.fuses = lambda: False
    model = load_model(path, resident="100%")
    folder.mkdir(parents=True)
    with squizd.open(path) as f:
        config = dict(f.metadata["model"]["config"])
    modules = {p: m for p, m in model.named_modules() if hasattr(m, "bits")}
    config["quantization"] = {"group_size": 64, "bits": 4} | {
        p: {"group_size": m.group_size, "bits": m.bits} for p, m in modules.items()
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(mlx.utils.tree_flatten(model.parameters()))
    names = sorted(weights)
    for i in range(0, len(names), 64):
        mx.save_safetensors(str(folder / f"model-{i:05}.safetensors"), {n: weights[n] for n in names[i : i + 64]})


def load_side(side: str, options: argparse.Namespace) -> nn.Module:
    if side == MLX:
        return mlx_lm_utils.load_model(Path(options.mlx))[0]
    return load_model(options.file, resident=side)


def first_token(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Twice: in a fresh process, and with everything but the model's memory already set up."""
    mx.eval(mx.zeros(1) + 1)  # the GPU is there
    out: dict[str, Any] = {}
    for turn in ("fresh", "again"):
        began = time.perf_counter()
        model = load_side(side, options)
        loaded = time.perf_counter() - began
        token = mx.argmax(model(mx.array([PROMPT]), cache=make_prompt_cache(model))[:, -1], axis=-1).item()
        out[turn] = {"seconds": time.perf_counter() - began, "load_seconds": loaded, "token": token}
        if side != MLX:
            state(model).close()
        del model
        mx.clear_cache()
    return out


def measure(side: str, options: argparse.Namespace) -> dict[str, Any]:
    trace = np.load(options.trace) if options.trace else None
    with squizd.open(options.file) as f:
        config = f.metadata["model"]["config"]
    chosen = choices(trace, config["num_hidden_layers"], config["num_experts"], config["num_experts_per_tok"])
    model = load_side(side, options)
    routed = route(model, chosen)
    decode(model, routed, 0, 150)  # kernels are compiled, slots fill
    digest, times, rates = hashlib.sha256(), [], []
    if side != MLX:
        state(model).reset_stats()
    for i in range(options.rounds):
        seconds, last = decode(model, routed, 150 + i * options.tokens, options.tokens)
        times += seconds
        rates.append(options.tokens / sum(seconds))
        digest.update(np.array(last.astype(mx.float32)).tobytes())
    out: dict[str, Any] = {
        "tokens_per_second": round(statistics.median(rates), 1),
        "milliseconds": {p: round(1e3 * float(np.percentile(times, p)), 2) for p in (50, 95, 99)},
        "logits": digest.hexdigest()[:16],
    }
    if side != MLX:
        stats, tokens = state(model).stats, options.rounds * options.tokens
        deferral = state(model).deferral
        out |= {
            "hit_rate": round(stats.hit_rate, 3),
            "gigabytes_read_per_token": round(stats.bytes_read / 1e9 / tokens, 3),
            "read_milliseconds_per_token": round(1e3 * stats.read_seconds / tokens, 2),
            "deferred": deferral is not None and (deferral.reason or deferral.tried),
            "asked_by_gpu": deferral is not None and (deferral.exchange_reason or deferral.exchange is not None),
        }
    return out


def in_a_process(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{arguments} failed")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--trace")
    parser.add_argument("--mlx")
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--shares", default="100%,50%,25%")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--first", help=argparse.SUPPRESS)
    parser.add_argument("--export", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.export:
        export(options.file, Path(options.mlx))
        print("{}")
        return
    if options.measure or options.first:
        found = measure(options.measure, options) if options.measure else first_token(options.first, options)
        print(json.dumps(found))
        return
    if options.mlx and not Path(options.mlx).exists():
        in_a_process("--export")
    shares = options.shares.split(",")
    sides = [*([MLX] if options.mlx else []), *shares]
    result: dict[str, Any] = {"benchmark": "cuda", "device": mx.device_info().get("device_name"), "file": options.file}
    for side in sides:
        result[side] = in_a_process("--measure", side)
        print(side, result[side], flush=True)
    starts: dict[str, list[dict[str, Any]]] = {side: [] for side in sides if side in (MLX, shares[-1])}
    for _ in range(options.starts):
        for side, found in starts.items():
            found.append(in_a_process("--first", side))
            print(side, found[-1], flush=True)
    for turn in ("fresh", "again") if options.starts else ():
        seconds = {side: statistics.median(x[turn]["seconds"] for x in found) for side, found in starts.items()}
        result[f"first_token_seconds_{turn}"] = {side: round(x, 2) for side, x in seconds.items()}
        if options.mlx:
            result[f"first_token_of_mlx_lm_{turn}"] = round(seconds[shares[-1]] / seconds[MLX], 3)
    whole = result[shares[0]]
    result["of_resident"] = {
        side: round(result[side]["tokens_per_second"] / whole["tokens_per_second"], 3) for side in shares
    }
    if options.mlx:
        result["resident_of_mlx_lm"] = round(whole["tokens_per_second"] / result[MLX]["tokens_per_second"], 3)
    print(json.dumps(result))
    if any(result[share]["logits"] != whole["logits"] for share in shares):
        sys.exit("the logits differ")


if __name__ == "__main__":
    main()
