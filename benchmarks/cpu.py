"""Decode and prefill on CPU: squizd's kernels, MLX's arithmetic, llama.cpp where installed; one run, interleaved.

    python benchmarks/cpu.py FILE.squizd [--gguf FILE.gguf ...] [--threads 2] [--rounds 5]

Every side sees the same prompt and the same number of threads. Each round times all sides one after another;
the figures are medians over rounds, `ratio` the median of each round's ratio. The last line is JSON.
The kernels' logits are within 1e-5 of MLX's (benchmarks/exactness.py); the side "mlx" is what SQUIZD_KERNELS=0 gives.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

PREFILL, CONTEXT = 512, 32


def squizd_side(path: str, share: str, off: bool) -> dict[str, Callable[[int], float]]:
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache

    import squizd
    from squizd.kernels import layers

    model: Any = squizd.load(path, resident=share)[0]
    ids = mx.array([(37 * i) % 8000 + 11 for i in range(PREFILL)])

    def decode(tokens: int) -> float:
        steps = generate_step(ids[:CONTEXT], model, max_tokens=tokens + 4)
        for _ in range(3):
            next(steps)
        began = time.perf_counter()
        for _ in range(tokens):
            next(steps)
        return tokens / (time.perf_counter() - began)

    def prefill(tokens: int) -> float:
        cache = make_prompt_cache(model)
        began = time.perf_counter()
        model(ids[None, :tokens], cache=cache)
        mx.eval([entry.state for entry in cache])
        return tokens / (time.perf_counter() - began)

    def plain(work: Callable[[int], float]) -> Callable[[int], float]:
        def run(tokens: int) -> float:
            with layers.switched_off():
                return work(tokens)

        return run

    return {"decode": plain(decode), "prefill": plain(prefill)} if off else {"decode": decode, "prefill": prefill}


def llama_side(path: str, threads: int) -> dict[str, Callable[[int], float]]:
    from llama_cpp import Llama  # type: ignore[import-not-found]

    model = Llama(
        path, n_ctx=2048, n_batch=PREFILL, n_ubatch=PREFILL, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    ids = [(37 * i) % 8000 + 11 for i in range(PREFILL)]

    def decode(tokens: int) -> float:
        model.reset()
        model.eval(ids[:CONTEXT])
        began = time.perf_counter()
        for i in range(tokens):
            model.eval([ids[i % PREFILL]])
        return tokens / (time.perf_counter() - began)

    def prefill(tokens: int) -> float:
        model.reset()
        began = time.perf_counter()
        model.eval(ids[:tokens])
        return tokens / (time.perf_counter() - began)

    return {"decode": decode, "prefill": prefill}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--gguf", action="append", default=[])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ |= {"SQUIZD_THREADS": str(options.threads), "SQUIZD_KERNELS": "1"}
    sides = {
        "squizd": squizd_side(options.file, "100%", False),
        "squizd, 50% resident": squizd_side(options.file, "50%", False),
        "squizd, 25% resident": squizd_side(options.file, "25%", False),
        "mlx": squizd_side(options.file, "100%", True),
    }
    for path in options.gguf:
        sides["llama.cpp " + os.path.basename(path)] = llama_side(path, options.threads)
    from squizd import kernels

    print(kernels.missing() or kernels.describe())
    rates: dict[str, list[float]] = {f"{side} {what}": [] for side in sides for what in ("decode", "prefill")}
    for side in sides.values():  # caches, threads and pages come to life
        side["decode"](8)
        side["prefill"](64)
    for _ in range(options.rounds):
        for name, side in sides.items():
            slow = name == "mlx"
            rates[f"{name} decode"].append(side["decode"](10 if slow else 80))
            rates[f"{name} prefill"].append(side["prefill"](128 if slow else PREFILL))
    result: dict[str, Any] = {"benchmark": "cpu", "arithmetic": kernels.describe(), "file": options.file}
    for name, found in rates.items():
        side, _, what = name.rpartition(" ")
        ours = rates[f"squizd {what}"]
        ratio = statistics.median(a / b for a, b in zip(ours, found, strict=True))
        middle = statistics.median(found)
        print(f"{name:44} {middle:9.1f} tokens/s, best {max(found):9.1f}; squizd is {ratio:.2f} times that")
        result[name] = {
            "tokens_per_second": round(middle, 1),
            "best": round(max(found), 1),
            "squizd_ratio": round(ratio, 3),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
