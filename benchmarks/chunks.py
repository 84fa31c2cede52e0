"""Time to the first token of a long prompt, with the chunk that the budget takes and with smaller ones.

    python benchmarks/chunks.py FILE.squizd [--resident 25%] [--prompt 2000] [--chunks 512] [--rounds 3]

One loaded model; chunks in turns, the system's cache warm; experts stay as the round before left them. Seconds: median,
and medians of each round's ratio to the budget's own chunk; experts read, and MLX's peak besides what was loaded. Last
line: JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step

from squizd.runtime.load import load_model, state


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--resident", default="25%")
    parser.add_argument("--prompt", type=int, default=2000, help="tokens")
    parser.add_argument("--chunks", type=int, nargs="+", default=[512], help="to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model: Any = load_model(options.file, resident=options.resident, context=options.prompt + 8)
    loaded = state(model)
    own = loaded.prefill_step_size
    prompt = mx.array(np.random.default_rng(3).integers(0, model.args.vocab_size, options.prompt))
    chunks = list(dict.fromkeys((own, *options.chunks)))
    seconds: dict[int, list[float]] = {chunk: [] for chunk in chunks}
    reads, peaks, weights = {}, {}, mx.get_active_memory()
    for _ in range(options.rounds):
        for chunk in random.sample(chunks, len(chunks)):
            loaded.reset_stats()
            mx.clear_cache()
            mx.reset_peak_memory()
            began = time.perf_counter()
            for _ in generate_step(prompt, model, max_tokens=1, prefill_step_size=chunk):
                seconds[chunk].append(time.perf_counter() - began)
            stats = loaded.stats
            reads[chunk], peaks[chunk] = stats.misses, mx.get_peak_memory() - weights
    result: dict[str, Any] = {"benchmark": "chunks", "file": options.file, "prompt": options.prompt, "own": own}
    room = loaded.budget.cache + loaded.budget.workspace
    print(f"{options.resident} resident, {options.prompt} tokens; {room / 1e6:.0f} MB reserved for cache and work")
    for chunk, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, seconds[own], strict=True))
        middle = statistics.median(values)
        print(
            f"chunks of {chunk:5}: {middle:7.2f} s, {ratio:.2f} of the budget's; "
            f"{reads[chunk]} reads, peak {peaks[chunk] / 1e6:.0f} MB"
        )
        result[str(chunk)] = {"seconds": round(middle, 3), "ratio": round(ratio, 3), "reads": reads[chunk]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
