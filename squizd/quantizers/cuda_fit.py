"""The fit of `mse` as a CUDA kernel, a thread for each group; results as good as other devices', not the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import mlx.core as mx

from squizd.quantizers.cuda import compiled

# Thread per group: steps 1 to 5 of `mse`. Products and sums are rounded one by one, for fused they would differ from
# what the min-max block is judged by. settings: margin, absolute margin, offsets, refinements, factors.
_FIT_HEADER: Final = """
#define LOOP _Pragma("unroll 1")  // unrolled they take seconds to compile
struct Group {
  const float *w, *weight;  // of element i at [i * stride]
  float mean, total, levels;
  bool weighted;
  int size, stride;
  __device__ float term(float x, int i) const { return weighted ? __fmul_rn(x, weight[i * stride]) : x; }
  __device__ float code(float x, float edge, float inverse) const {
    return floorf(fminf(fmaxf(__fmul_rn(x - edge, inverse), 0.0f), levels + 0.5f));
  }
  __device__ float squares(float scale, float bias) const {
    const float edge = bias - 0.5f * scale, inverse = scale == 0 ? 0 : 1 / scale;
    float found = 0;
    _Pragma("unroll 4") for (int i = 0; i < size; i++) {
      const float x = w[i * stride];
      const float d = __fadd_rn(__fmul_rn(code(x, edge, inverse), scale), bias) - x;
      found += term(__fmul_rn(d, d), i);
    }
    return found;
  }
  __device__ float least_squares(float scale, float inverse, float bias, float& s, float& b) const {
    const float edge = bias - 0.5f * scale;
    float codes = 0, square = 0, covariance = 0;
    _Pragma("unroll 4") for (int i = 0; i < size; i++) {
      const float x = w[i * stride] - mean, q = code(x, edge, inverse), p = term(q, i);
      codes += p;
      square += p * q;
      covariance += p * x;
    }
    const float middle = codes / total, variance = fmaxf(square - codes * middle, 1e-6f * square + 1e-30f);
    s = covariance / variance;
    b = -s * middle;
    return s * covariance;
  }
};
"""
_FIT: Final = """
    extern __shared__ float memory[];
    const int threads = blockDim.x, t = threadIdx.x, groups = place[0], per_row = place[1], start = place[2];
    const int bits = place[4], size = place[5], starts = place[6], refinements = place[7];
    const size_t first = size_t(blockIdx.x) * threads, n = first + t;
    const float levels = (1 << bits) - 1;
    float *values = memory, *weights = memory + size * threads;
    LOOP for (int i = t; i < size * threads; i += threads)
      if (first + i / size < groups) values[i % size * threads + i / size] = float(w[first * size + i]);
    if (WEIGHTED)
      LOOP for (int i = t; i < size * threads; i += threads) {
        const size_t group = first + i / size, row = group / per_row + start;
        if (group < groups)
          weights[i % size * threads + i / size] =
              importance[(row / place[3] * per_row + group % per_row) * size + i % size];
      }
    __syncthreads();
    if (n >= groups) return;
    float *v = values + t, *p = weights + t;
    float largest = 0;
    LOOP for (int i = 0; i < size; i++) largest = fmaxf(largest, fabsf(v[i * threads]));
    const int exponent = __float_as_uint(largest) & 0x7F800000;
    const float power = __uint_as_float(max((254 << 23) - exponent, 1 << 23));
    LOOP for (int i = 0; i < size; i++) v[i * threads] *= power;
    if (WEIGHTED) {
      float top = 0, sum = 0;
      LOOP for (int i = 0; i < size; i++) top = fmaxf(top, p[i * threads]);
      LOOP for (int i = 0; i < size; i++) sum += p[i * threads] = top > 0 ? p[i * threads] / top : 1;
      LOOP for (int i = 0; i < size; i++) p[i * threads] /= sum;
    }
    Group g = {v, p, 0, WEIGHTED ? 1.0f : float(size), levels, WEIGHTED, size, threads};
    float sum = 0;
    LOOP for (int i = 0; i < size; i++) sum += g.term(v[i * threads], i);
    g.mean = sum / g.total;
    float lowest = v[0] - g.mean, highest = lowest;
    LOOP for (int i = 1; i < size; i++) {
      lowest = fminf(lowest, v[i * threads] - g.mean);
      highest = fmaxf(highest, v[i * threads] - g.mean);
    }
    const float step = (highest > lowest ? highest - lowest : 1.0f) / levels;
    const float *offsets = settings + 2, *distances = offsets + starts, *factors = distances + refinements;
    float best = -1, low = 0, high = 0, s, b;
    auto fit = [&](float at_low, float at_high) {
      const float scale = fmaxf(step * (1 - (at_low + at_high) / levels), 0.1f * step);
      return g.least_squares(scale, 1 / scale, lowest + step * at_low, s, b);
    };
    auto attempt = [&](float at_low, float at_high) {
      const float gain = fit(at_low, at_high);
      if (gain > best) best = gain, low = at_low, high = at_high;
    };
    LOOP for (int i = 0; i < starts; i++)
      LOOP for (int j = 0; j < starts; j++) attempt(offsets[i], offsets[j]);
    LOOP for (int r = 0; r < refinements; r++) {
      const float from_low = low, from_high = high, d = distances[r];
      LOOP for (int i = -1; i <= 1; i++)
        LOOP for (int j = -1; j <= 1; j++)
          if (i || j) attempt(from_low + i * d, from_high + j * d);
    }
    fit(low, high);
    LOOP for (int round = 0; round < place[9]; round++) g.least_squares(s, 1 / fmaxf(s, 1e-30f), b, s, b);
    const float scale = s, bias = b, first_scale = float(scales[n]), first_bias = float(biases[n]);
    const unsigned* from = packed + n * (size * bits / 32);
    auto stored = [&](int i) {  // the min-max block's code
      const int at = i * bits, word = at / 32, shift = at % 32;
      unsigned long long pair = from[word];
      if (shift + bits > 32) pair |= static_cast<unsigned long long>(from[word + 1]) << 32;
      return unsigned(pair >> shift) & ((1u << bits) - 1);
    };
    float error = 0;
    LOOP for (int i = 0; i < size; i++) {
      const float made = __fadd_rn(__fmul_rn(float(stored(i)), first_scale), first_bias);
      const float d = __fmul_rn(made, power) - v[i * threads];
      error += g.term(__fmul_rn(d, d), i);
    }
    error = fmaxf(error * (1 - settings[0]) - settings[1], 0.0f);
    float kept_scale = first_scale, kept_bias = first_bias;
    bool won = false;
    auto offer = [&](float scale, float bias) {
      const float left = g.squares(scale * power, bias * power);
      if (left < error) error = left, kept_scale = scale, kept_bias = bias, won = true;
    };
    offer(first_scale, first_bias);
    LOOP for (int f = 0; f < place[8]; f++) {
      const float as_stored = float(S(scale * factors[f] / power)), wide = as_stored * power;
      const float edge = bias + g.mean - 0.5f * wide, inverse = wide == 0 ? 0 : 1 / wide;
      float codes = 0;
      LOOP for (int i = 0; i < size; i++) codes += g.term(g.code(v[i * threads], edge, inverse), i);
      offer(as_stored, float(S((g.mean - wide * codes / g.total) / power)));
    }
    new_scales[n] = S(kept_scale);
    new_biases[n] = S(kept_bias);
    const float wide = kept_scale * power, edge = kept_bias * power - 0.5f * wide, inverse = wide == 0 ? 0 : 1 / wide;
    unsigned* to = new_codes + n * (size * bits / 32);
    unsigned long long queue = 0;
    int held = 0;
    LOOP for (int i = 0; i < size; i++) {
      const unsigned code = won ? unsigned(g.code(v[i * threads], edge, inverse)) : stored(i);
      queue |= static_cast<unsigned long long>(code) << held;
      held += bits;
      if (held >= 32) {
        *to++ = unsigned(queue);
        queue >>= 32;
        held -= 32;
      }
    }
"""


def fit(
    w: mx.array, blocks: Sequence[mx.array], bits: int, group_size: int, importance: mx.array | None, start: int,
    rows_per_weight: int, settings: Sequence[float], counts: tuple[int, int, int, int],
) -> tuple[mx.array, mx.array, mx.array]:  # fmt: skip
    """`mse._fit` and `mse._merged` for rows w [n, in], of which the first is row `start` of its tensor.

    blocks: codes, scales, biases of the min-max fit; settings: both margins, where edges are tried, refinements and
    factors; counts: of the last three, and rounds. Returns blocks.
    """
    codes, scales, biases = blocks
    rows, width = w.shape
    groups, threads = rows * width // group_size, 4096 // group_size
    weights = [mx.zeros(1)] if importance is None else [importance]
    place = [groups, width // group_size, start, rows_per_weight, bits, group_size, *counts]
    kernel = compiled(
        "fit", "w packed scales biases importance settings place", "new_codes new_scales new_biases", _FIT, _FIT_HEADER,
        shared=4 * 4096 * (1 if importance is None else 2),
    )  # fmt: skip
    found = kernel(
        inputs=[w, codes, scales, biases, *weights, mx.array(list(settings), mx.float32), mx.array(place, mx.int32)],
        template=[("W", w.dtype), ("S", scales.dtype), ("WEIGHTED", importance is not None)],
        grid=(-(-groups // threads) * threads, 1, 1), threadgroup=(threads, 1, 1),
        output_shapes=[x.shape for x in blocks], output_dtypes=[x.dtype for x in blocks],
    )  # fmt: skip
    new_codes, new_scales, new_biases = found
    return new_codes, new_scales, new_biases
