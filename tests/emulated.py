"""CUDA kernels as MLX takes them, run on the CPU: their text as C++, a POSIX thread for each of a block's.

For machines without a GPU. Blocks run one after another; `__syncthreads` is a barrier, and so is `__syncwarp`.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from squizd.kernels.build import find_compiler

TYPES = {mx.float32: "float", mx.bfloat16: "bfloat16", mx.uint32: "unsigned", mx.int32: "int"}
PRELUDE = r"""
#include <math.h>
#include <pthread.h>
#include <stddef.h>
#include <string.h>
#define __shared__ static
#define __device__
struct Place { int x, y, z; };
static thread_local Place threadIdx;
static Place blockIdx, blockDim, gridDim;
static pthread_barrier_t barrier;
static char dynamic[1 << 18] __attribute__((aligned(16)));
static void __syncthreads() { pthread_barrier_wait(&barrier); }
static void __syncwarp() { pthread_barrier_wait(&barrier); }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fmul_rn(float a, float b) { return a * b; }
static int max(int a, int b) { return a > b ? a : b; }
static unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
static float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }
struct bfloat16 {
  unsigned short bits;
  bfloat16(float x) : bits((__float_as_uint(x) + 0x7fff + ((__float_as_uint(x) >> 16) & 1)) >> 16) {}
  operator float() const { return __uint_as_float(unsigned(bits) << 16); }
};
"""
MAIN = r"""
static void* one(void* number) {
  threadIdx = {int(reinterpret_cast<size_t>(number)), 0, 0};
  body();
  return 0;
}
extern "C" void run(void** given, int x, int y, int z, int threads) {
  arguments = given;
  blockDim = {threads, 1, 1};
  gridDim = {x, y, z};
  pthread_t all[1024];
  for (int k = 0; k < z; k++)
    for (int j = 0; j < y; j++)
      for (int i = 0; i < x; i++) {
        blockIdx = {i, j, k};
        pthread_barrier_init(&barrier, 0, threads);
        for (size_t t = 0; t < size_t(threads); t++) pthread_create(all + t, 0, one, reinterpret_cast<void*>(t));
        for (int t = 0; t < threads; t++) pthread_join(all[t], 0);
        pthread_barrier_destroy(&barrier);
      }
}
"""


def cuda_kernel(folder: Path) -> Any:
    """What stands in for `mx.fast.cuda_kernel`; compiles into `folder`."""

    def make(name: str, input_names: list[str], output_names: list[str], source: str, header: str, **_: Any) -> Any:
        def call(
            inputs: list[mx.array], template: list[tuple[str, Any]], grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int], output_shapes: list[tuple[int, ...]], output_dtypes: list[mx.Dtype],
        ) -> list[mx.array]:  # fmt: skip
            shaped = [n for n in input_names if f"{n}_shape" in source]
            types = [f"const {TYPES[x.dtype]}*" for x in inputs] + [f"{TYPES[d]}*" for d in output_dtypes]
            types += ["const int*"] * len(shaped)
            names = [*input_names, *output_names, *(f"{n}_shape" for n in shaped)]
            lines = [
                f"auto {n} = static_cast<{t}>(arguments[{i}]);"
                for i, (n, t) in enumerate(zip(names, types, strict=True))
            ]
            for key, value in template:
                kind = "bool" if isinstance(value, bool) else "int"
                lines.append(
                    f"using {key} = {TYPES[value]};"
                    if isinstance(value, mx.Dtype)
                    else f"constexpr {kind} {key} = {int(value)};"
                )
            body = re.sub(
                r"extern __shared__ (\w+) memory\[\];", r"auto memory = reinterpret_cast<\1*>(dynamic);", source
            )
            text = "\n".join(
                [PRELUDE, header, "static void** arguments;", "static void body() {", *lines, body, "}", MAIN]
            )
            path = folder / f"{name}_{'_'.join(str(v) for _, v in template).replace('.', '_')}.cpp"
            library = path.with_suffix(".so")
            if not library.exists():
                path.write_text(text)
                flags = ["-std=c++17", "-O1", "-w", "-ffp-contract=off", "-shared", "-fPIC", "-pthread"]
                subprocess.run([*find_compiler(), *flags, str(path), "-o", str(library)], check=True)
            arrays = [np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x) for x in map(mx.contiguous, inputs)]
            made = [
                mx.zeros(s, mx.uint16 if d == mx.bfloat16 else d)
                for s, d in zip(output_shapes, output_dtypes, strict=True)
            ]
            found = [np.array(x) for x in made]
            shapes = [np.array(inputs[input_names.index(n)].shape, np.int32) for n in shaped]
            pointers = (ctypes.c_void_p * len(names))(*(x.ctypes.data for x in (*arrays, *found, *shapes)))
            blocks = [-(-g // t) for g, t in zip(grid, threadgroup, strict=True)]
            ctypes.CDLL(str(library)).run(pointers, *blocks, threadgroup[0])
            results = [mx.array(x) for x in found]
            return [r.view(d) if r.dtype != d else r for r, d in zip(results, output_dtypes, strict=True)]

        return call

    return make
