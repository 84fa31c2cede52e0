"""What `gptq` does column by column or block by block, as CUDA kernels: one call in place of thousands.

MLX starts a kernel per operation, and on small arrays a start takes longer than the arithmetic. Knows the loops of
that module, which other devices run in MLX; results are as good, not the same bits. Arrays are evaluated lazily.
"""

from __future__ import annotations

import zlib
from functools import cache
from typing import Any, Final

import mlx.core as mx

BLOCK: Final = 32  # columns that `block` takes
LARGEST: Final = 128  # unknowns of `solve`: their triangle in float64 is 66 KB of shared memory

# Thread per row of weights; own[i][j] says what an error in column i does to column j > i.
_BLOCK: Final = """
    __shared__ float own[32][32];
    const int s = blockIdx.y, o = blockIdx.x * blockDim.x + threadIdx.x, out = given_shape[2];
    const float top = last[0];
    for (int i = threadIdx.x; i < 1024; i += blockDim.x) own[i / 32][i % 32] = between[s * 1024 + i];
    __syncthreads();
    if (o >= out) return;
    const float step = steps[s * out + o], offset = offsets[s * out + o], inverse = step == 0 ? 0 : 1 / step;
    float b[32];
    #pragma unroll
    for (int i = 0; i < 32; i++) b[i] = pull[(s * 32 + i) * size_t(out) + o];
    #pragma unroll
    for (int i = 0; i < 32; i++) {
      const size_t at = (s * 32 + i) * size_t(out) + o;
      const float was = given[at];
      const float best = DESCEND ? was - b[i] / own[i][i] : b[i];
      const float code = fminf(fmaxf(rintf((best - offset) * inverse), 0.0f), top);
      const float made = __fadd_rn(__fmul_rn(code, step), offset);
      const float change = DESCEND ? made - was : was - made;
      codes[at] = code;
      changes[at] = change;
      #pragma unroll
      for (int j = i + 1; j < 32; j++) b[j] += own[i][j] * change;
    }
"""

# Warp per matrix of 32 x 32: L with A = L Lᵀ, and its inverse.
_FACTOR: Final = """
    __shared__ float l[32][33], x[32][33];
    const int s = blockIdx.x, t = threadIdx.x;
    for (int i = 0; i < 32; i++) l[i][t] = a[s * 1024 + i * 32 + t];
    __syncwarp();
    for (int k = 0; k < 32; k++) {
      const float pivot = sqrtf(fmaxf(l[k][k], 1e-6f));
      __syncwarp();
      if (t == k) l[k][k] = pivot;
      if (t > k) l[t][k] /= pivot;
      __syncwarp();
      if (t > k)
        for (int j = k + 1; j <= t; j++) l[t][j] -= l[t][k] * l[j][k];
      __syncwarp();
    }
    for (int i = 0; i < 32; i++) {  // column t of the inverse
      float sum = i == t;
      for (int j = t; j < i; j++) sum -= l[i][j] * x[j][t];
      x[i][t] = i < t ? 0 : sum / l[i][i];
    }
    __syncwarp();
    for (int i = 0; i < 32; i++) {
      lower[s * 1024 + i * 32 + t] = t <= i ? l[i][t] : 0;
      inverse[s * 1024 + i * 32 + t] = x[i][t];
    }
"""

# Thread per row of weights and group.
_SUMS: Final = """
    const int o = blockIdx.x * blockDim.x + threadIdx.x, j = blockIdx.y, groups = gridDim.y, out = values_shape[2];
    const int group = values_shape[1] / groups;
    const size_t s = blockIdx.z;
    if (o >= out) return;
    float product = 0, sum = 0;
    for (int i = 0; i < group; i++) {
      const size_t at = ((s * groups + j) * group + i) * out + o;
      product += values[at] * codes[at];
      sum += values[at];
    }
    found[(s * 2 * groups + j) * out + o] = product;
    found[(s * 2 * groups + groups + j) * out + o] = sum;
"""

# Block per system, thread per row; float64, for these systems are badly conditioned. L D Lᵀ, as indefinite ones occur.
_SOLVE: Final = """
    extern __shared__ double memory[];
    const size_t s = blockIdx.x;
    const int t = threadIdx.x, n = targets_shape[1];
    double* l = memory;                    // row i starts at i (i + 1) / 2
    double* y = memory + n * (n + 1) / 2;
    _Pragma("unroll 1") for (int i = 0; i < n; i++)
      if (t <= i) l[i * (i + 1) / 2 + t] = matrices[(s * n + i) * n + t];
    y[t] = targets[s * n + t];
    __syncthreads();
    double trace = 0;
    _Pragma("unroll 1") for (int i = 0; i < n; i++) trace += l[i * (i + 1) / 2 + i];
    const double ridge = 1e-6 * trace / n + 1e-30;
    __syncthreads();
    double* own = l + t * (t + 1) / 2;
    own[t] += ridge;
    __syncthreads();
    _Pragma("unroll 1") for (int k = 0; k < n; k++) {
      const double d = l[k * (k + 1) / 2 + k], pivot = fabs(d) > 1e-3 * ridge ? d : ridge;
      double factor = 0;
      if (t > k) {
        factor = own[k] / pivot;
        _Pragma("unroll 1") for (int j = k + 1; j <= t; j++) own[j] -= factor * l[j * (j + 1) / 2 + k];
      }
      __syncthreads();
      if (t > k) own[k] = factor;
      if (t == k) own[k] = pivot;
      __syncthreads();
    }
    _Pragma("unroll 1") for (int k = 0; k < n; k++) {
      if (t > k) y[t] -= own[k] * y[k];
      __syncthreads();
    }
    y[t] /= own[t];
    __syncthreads();
    _Pragma("unroll 1") for (int k = n - 1; k > 0; k--) {
      if (t < k) y[t] -= l[k * (k + 1) / 2 + t] * y[k];
      __syncthreads();
    }
    solved[s * n + t] = y[t];
"""


@cache
def compiled(name: str, inputs: str, outputs: str, source: str, header: str = "", shared: int = 0) -> Any:
    """`mx.fast.cuda_kernel` with names in one string each, and a name that changes with the source."""
    make: Any = mx.fast.cuda_kernel
    version = zlib.crc32((header + source).encode())  # MLX keeps what it compiled by name, also for later processes
    return make(
        name=f"squizd_{name}_{version:08x}", input_names=inputs.split(), output_names=outputs.split(), source=source,
        header=header, shared_memory=shared,
    )  # fmt: skip


def block(
    descend: bool, pull: mx.array, given: mx.array, between: mx.array, steps: mx.array, offsets: mx.array, bits: int
) -> tuple[mx.array, mx.array]:
    """The inner loops of `gptq._round` and, with `descend`, of `gptq._descend`, over `BLOCK` columns.

    pull: targets (half slopes) [stack, BLOCK, out]; given: the weights (the decoded ones); between: feedback (H's own
    block) [stack, BLOCK, BLOCK]; steps and offsets [stack, 1, out]. All float32. Returns codes and errors (changes),
    [stack, BLOCK, out].
    """
    stack, _, out = pull.shape
    name = "descend" if descend else "round"
    kernel = compiled(name, "pull given between steps offsets last", "codes changes", _BLOCK)
    codes, changes = kernel(
        inputs=[pull, given, between, steps, offsets, mx.array([(1 << bits) - 1], mx.float32)],
        template=[("DESCEND", descend)],
        grid=(-(-out // 128) * 128, stack, 1), threadgroup=(128, 1, 1),
        output_shapes=[pull.shape, pull.shape], output_dtypes=[mx.float32, mx.float32],
    )  # fmt: skip
    return codes, changes


def factors(h: mx.array) -> tuple[mx.array, mx.array]:
    """As `gptq._feedback`, in float32, which damped Hessians allow; h [stack, in, in], `in` a multiple of `BLOCK`."""
    lower, _ = _cholesky(h[:, ::-1, ::-1])
    upper = lower[:, ::-1, ::-1]
    diagonal = mx.diagonal(upper, axis1=1, axis2=2)
    unit, cost = mx.triu(upper / diagonal[:, None, :], 1), mx.square(diagonal)
    mx.eval(unit, cost)
    return unit, cost


def solve_damped(h: mx.array, targets: mx.array) -> mx.array:
    """x with h x = targets [stack, in, n], in float32; h [stack, in, in] damped, `in` a multiple of `BLOCK`."""
    lower, inverses = _cholesky(h)
    found: list[mx.array] = []
    for i, inverse in enumerate(inverses):
        part = targets[:, i * BLOCK : (i + 1) * BLOCK]
        if found:
            part = part - _exact(lower[:, i * BLOCK : (i + 1) * BLOCK, : i * BLOCK], mx.concatenate(found, axis=1))
        found.append(_exact(inverse, part))
        mx.eval(found[-1])
    forward, found = found, []
    for i, inverse in reversed(list(enumerate(inverses))):
        part = forward[i]
        if found:
            below = lower[:, (i + 1) * BLOCK :, i * BLOCK : (i + 1) * BLOCK]
            part = part - _exact(mx.swapaxes(below, 1, 2), mx.concatenate(found[::-1], axis=1))
        found.append(_exact(mx.swapaxes(inverse, 1, 2), part))
        mx.eval(found[-1])
    return mx.concatenate(found[::-1], axis=1)


def _cholesky(h: mx.array) -> tuple[mx.array, list[mx.array]]:
    """L with h = L Lᵀ, and the inverses of its blocks on the diagonal; evaluated."""
    stack, width, _ = h.shape
    kernel = compiled("factor", "a", "lower inverse", _FACTOR)
    lower, inverses = mx.zeros(h.shape), list[mx.array]()
    for start in range(0, width, BLOCK):
        end = start + BLOCK
        panel = h[:, start:, start:end]
        if start:
            panel = panel - _exact(lower[:, start:, :start], mx.swapaxes(lower[:, start:end, :start], 1, 2))
        own, inverse = kernel(
            inputs=[panel[:, :BLOCK]], template=[], grid=(32 * stack, 1, 1), threadgroup=(32, 1, 1),
            output_shapes=[(stack, BLOCK, BLOCK)] * 2, output_dtypes=[mx.float32] * 2,
        )  # fmt: skip
        below = _exact(panel[:, BLOCK:], mx.swapaxes(inverse, 1, 2))
        lower[:, start:, start:end] = mx.concatenate([own, below], axis=1) if end < width else own
        inverses.append(inverse)
        mx.eval(lower, inverse)
    return lower, inverses


def _exact(a: mx.array, b: mx.array) -> mx.array:
    """a @ b nearly as in float32, where MLX multiplies TF32 numbers: these have 10 binary digits after the first."""
    high_a, high_b = ((x.view(mx.uint32) & 0xFFFFE000).view(mx.float32) for x in (a, b))
    return high_a @ high_b + (high_a @ (b - high_b) + (a - high_a) @ b)


def refit(codes: mx.array, left: mx.array, h: mx.array, group: int) -> mx.array:
    """What `gptq._refit` changes scales and biases by, [stack, 2 groups, out], for up to `LARGEST` of them.

    codes and what they leave of the weights, [stack, in, out]; h [stack, in, in]. A bias's basis is 1 in each column,
    so its products are sums over columns of those of scales, or over H.
    """
    stack, width, out = codes.shape
    groups = width // group

    def sums(x: mx.array) -> mx.array:
        """Over the rows of each group of x [stack, in, out], times codes and as they are: [stack, 2 groups, out]."""
        kernel = compiled("sums", "values codes", "found", _SUMS)
        (found,) = kernel(
            inputs=[x, codes], template=[], grid=(-(-out // 128) * 128, groups, stack),
            threadgroup=(128, 1, 1), output_shapes=[(stack, 2 * groups, out)], output_dtypes=[mx.float32],
        )  # fmt: skip
        result: mx.array = found
        return result

    rows = []
    for start in range(0, width, group):
        rows.append(sums(mx.swapaxes(h[:, start : start + group], 1, 2) @ codes[:, start : start + group]))
        mx.eval(rows[-1])
    scales = mx.stack(rows, axis=1)
    between = mx.sum(h.reshape(stack, groups, group, groups, group), axis=(2, 4))[..., None]
    biases = [mx.swapaxes(scales[:, :, groups:], 1, 2), mx.broadcast_to(between, (stack, groups, groups, out))]
    systems = mx.concatenate([scales, mx.concatenate(biases, axis=2)], axis=1).transpose(0, 3, 1, 2)
    targets = mx.swapaxes(sums(h @ left), 1, 2)
    found = solve(systems.reshape(-1, 2 * groups, 2 * groups), targets.reshape(-1, 2 * groups))
    return mx.swapaxes(found.reshape(stack, out, 2 * groups), 1, 2)


def _solve_bytes(size: int) -> int:
    return 8 * (size * (size + 1) // 2 + size)


def solve(matrices: mx.array, targets: mx.array) -> mx.array:
    """Solutions of symmetric systems with a ridge as in `gptq._refit`.

    matrices [n, k, k], k up to `LARGEST`, targets [n, k]; float32.
    """
    count, size = targets.shape
    shared = _solve_bytes(size)
    large = shared > 48_000  # more is asked for when a kernel is first used, for good
    kernel = compiled("solve", "matrices targets", "solved", _SOLVE, shared=_solve_bytes(LARGEST) if large else shared)
    (solved,) = kernel(
        inputs=[matrices, targets], template=[("LARGE", large)], grid=(size * count, 1, 1), threadgroup=(size, 1, 1),
        output_shapes=[targets.shape], output_dtypes=[mx.float32],
    )  # fmt: skip
    found: mx.array = solved
    return found
