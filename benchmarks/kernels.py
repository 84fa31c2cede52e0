"""The kernels alone: GB/s of weights against this machine's memory, GFLOP/s against NumPy's BLAS; one run, interleaved.

    python benchmarks/kernels.py [--threads 2] [--rounds 7]

Decode: one token against experts 2048 × 768, top-8 of 128 (each of the 128 once, in random order, so that weights come
from memory). Bytes are codes, scales and biases as they lie in memory (float32 scales). The memory figure is a compiled
loop that reads the 6-bit experts' codes (MLX's memory: the same pages) on as many threads; NumPy's sum is too slow to
be a peak. Prefill: 512 rows. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


READ = """
extern "C" unsigned long read_all(const unsigned long* p, unsigned long n) {
  unsigned long a[32] = {};
  for (unsigned long i = 0; i + 32 <= n; i += 32)
    for (int j = 0; j < 32; j++) a[j] |= p[i + j];
  for (int j = 1; j < 32; j++) a[0] |= a[j];
  return a[0];
}
"""


def reader(compiler: list[str]) -> Callable[[int, int], int]:
    """read(address, words): looks at all of them, with this machine's widest loads."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*compiler, "-O3", "-march=native", "-mprefer-vector-width=512", "-shared", "-fPIC", "-x", "c++"]
        command = [part for part in command if "prefer" not in part or os.uname().machine == "x86_64"]
        subprocess.run([*command, "-", "-o", f"{folder}/read.so"], input=READ, text=True, check=True)
        function = ctypes.CDLL(f"{folder}/read.so").read_all
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_ulong), ctypes.c_ulong
    read: Callable[[int, int], int] = function
    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    os.environ["SQUIZD_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(options.threads)
    import mlx.core as mx
    import numpy as np

    from squizd import kernels
    from squizd.kernels.build import find_compiler

    native = kernels.native()
    if native is None:
        raise SystemExit(kernels.missing())
    rng = np.random.default_rng(0)
    pool = ThreadPoolExecutor(options.threads)

    read = reader(find_compiler())
    pieces: list[Any] = []

    def read_memory() -> float:
        def one(piece: Any) -> int:
            return read(piece.ctypes.data, piece.nbytes // 8)

        size: int = sum(piece.nbytes for piece in pieces)
        return size / timed(lambda: list(pool.map(one, pieces))) / 1e9

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
        if bits == 6:
            pieces += np.array_split(np.array(gate[0], copy=False).reshape(-1), options.threads)

        up, _ = weights(128, 768, 2048, bits)

        def experts(
            g: Any = gate, u: Any = up, d: Any = down, size: int = 2 * each + each_down, x: mx.array = x
        ) -> float:
            ids = [mx.array(eight[None]) for eight in rng.permutation(128).astype(np.uint32).reshape(16, 8)]
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
