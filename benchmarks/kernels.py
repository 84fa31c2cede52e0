"""The kernels alone: GB/s of weights against this machine's memory, GFLOP/s against NumPy's BLAS; one run, interleaved.

    python benchmarks/kernels.py [--threads 2] [--rounds 7]

Decode: one token against experts 2048 × 768, top-8 of 128 (all 128 experts visited in turn, so that weights come from
memory). Bytes are codes, scales and biases as they lie in memory (float32 scales). The memory figure is the same
number of threads reading a large array. Prefill: 512 rows. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    os.environ["SQUIZD_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(options.threads)
    import mlx.core as mx
    import numpy as np

    from squizd import kernels

    native = kernels.native()
    if native is None:
        raise SystemExit(kernels.missing())
    rng = np.random.default_rng(0)
    pool = ThreadPoolExecutor(options.threads)

    large = np.ones(1 << 26, np.float32)  # 256 MB
    pieces = np.array_split(large.view(np.float64), options.threads)

    def read_memory() -> float:
        return large.nbytes / timed(lambda: list(pool.map(lambda piece: float(piece.sum()), pieces))) / 1e9

    square = rng.standard_normal((1024, 1024)).astype(np.float32)

    def sgemm() -> float:
        return 2 * 1024**3 / timed(lambda: square @ square) / 1e9

    def weights(experts: int, rows: int, cols: int, bits: int) -> tuple[tuple[Any, ...], int]:
        codes = mx.array(rng.integers(0, 1 << 32, (experts, rows, cols * bits // 32), np.uint32))
        scales = mx.array(rng.random((experts, rows, cols // 64), np.float32))
        arrays = (codes, scales, mx.array(rng.random((experts, rows, cols // 64), np.float32)))
        mx.eval(arrays)
        return (*arrays, 64, bits, "affine"), sum(a.nbytes for a in arrays) // experts

    measures: dict[str, Callable[[], float]] = {"memory, read": read_memory, "sgemm, NumPy": sgemm}
    for bits in (2, 3, 4, 5, 6, 8):
        gate, each = weights(128, 768, 2048, bits)
        down, each_down = weights(128, 2048, 768, bits)
        x = mx.array(rng.standard_normal((1, 2048)).astype(np.float32))

        up, _ = weights(128, 768, 2048, bits)

        def experts(
            g: Any = gate, u: Any = up, d: Any = down, size: int = 2 * each + each_down, x: mx.array = x
        ) -> float:
            ids = [mx.arange(at, at + 8, dtype=mx.uint32)[None] for at in range(0, 128, 8)]
            mx.eval(ids)
            calls = [native.swiglu_experts(x, i, *g, *u, *d) for i in ids]
            return 128 * size / timed(lambda: mx.eval(calls)) / 1e9

        measures[f"decode, experts, {bits} bits"] = experts
    for bits in (4, 8):
        layer, _ = weights(1, 2048, 2048, bits)
        flat = (*(a[0] for a in layer[:3]), *layer[3:])
        mx.eval(flat[:3])
        rows = mx.array(rng.standard_normal((512, 2048)).astype(np.float32))

        def prefill(flat: Any = flat, rows: mx.array = rows) -> float:
            return 2 * 512 * 2048 * 2048 / timed(lambda: mx.eval(native.linear(rows, *flat))) / 1e9

        measures[f"prefill, linear, {bits} bits"] = prefill

    found: dict[str, list[float]] = {name: [] for name in measures}
    for measure in measures.values():
        measure()
    for _ in range(options.rounds):
        for name, measure in measures.items():
            found[name].append(measure())
    result: dict[str, Any] = {"benchmark": "kernels", "arithmetic": kernels.describe()}
    for name, values in found.items():
        unit, peak = ("GFLOP/s", "sgemm, NumPy") if "prefill" in name or "sgemm" in name else ("GB/s", "memory, read")
        share = max(values) / max(found[peak])
        print(
            f"{name:28} median {statistics.median(values):7.1f}, best {max(values):7.1f} {unit}, {share:.2f} of {peak}"
        )
        result[name] = {
            "median": round(statistics.median(values), 1),
            "best": round(max(values), 1),
            "share_of_peak": round(share, 3),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
