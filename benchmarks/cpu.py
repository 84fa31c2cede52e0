"""Decode and prefill on CPU: squizd's kernels, MLX's arithmetic, llama.cpp where installed; one run, interleaved.

    python benchmarks/cpu.py FILE.squizd [--gguf FILE.gguf ...] [--threads 2] [--rounds 5]

The trials of `squizd bench`: every side in a process of its own, the same prompt and number of threads, in turns within
each round; figures are medians over rounds, `ratio` the median of each round's ratio. Prefill is a prompt of 512
tokens over the time to its first token, decode what follows a prompt of 32. The last line is JSON. The kernels' logits
are within 1e-5 of MLX's (benchmarks/exactness.py); the side "mlx" is what SQUIZD_KERNELS=0 gives.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from squizd import kernels
from squizd.sides import Side, Trial
from squizd.trials import compare, rate

PREFILL, CONTEXT = 512, 32


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--gguf", action="append", default=[])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=80, help="to decode (default: %(default)s)")
    options = parser.parse_args()
    os.environ |= {"SQUIZD_THREADS": str(options.threads), "SQUIZD_KERNELS": "1"}
    ours = Side("squizd", "squizd", options.file, resident="100%", threads=options.threads)
    sides = [ours, *(replace(ours, name=f"squizd, {s} resident", resident=s) for s in ("50%", "25%"))]
    sides += [replace(ours, name="mlx", kernels=False)]
    sides += [replace(ours, name=f"llama.cpp {os.path.basename(p)}", kind="llama.cpp", path=p) for p in options.gguf]
    print(kernels.missing() or kernels.describe())
    ids = [(37 * i) % 8000 + 11 for i in range(PREFILL)]
    prefill: Callable[[Trial], float] = lambda trial: PREFILL / trial.seconds[0]  # noqa: E731
    result: dict[str, Any] = {"benchmark": "cpu", "arithmetic": kernels.describe(), "file": options.file}
    for what, prompt, tokens, speed in (("decode", ids[:CONTEXT], options.tokens, rate), ("prefill", ids, 2, prefill)):
        found, _ = compare(sides, prompt, tokens, options.rounds)
        best = [speed(trial) for trial in found["squizd"]]
        for side, trials in found.items():
            rates = [speed(trial) for trial in trials]
            ratio = statistics.median(a / b for a, b in zip(best, rates, strict=True))
            middle, name = statistics.median(rates), f"{side} {what}"
            print(f"{name:44} {middle:9.1f} tokens/s, best {max(rates):9.1f}; squizd is {ratio:.2f} times that")
            result[name] = {
                "tokens_per_second": round(middle, 1),
                "best": round(max(rates), 1),
                "squizd_ratio": round(ratio, 3),
            }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
