// The fit of affine blocks that squizd/quantizers/mse.py describes and does in MLX: the same operations on the same numbers in
// the same order, 16 groups side by side, so the results have the same bits. Included by arithmetic.cpp, once per instruction set.
#pragma once
#include <math.h>

#include "arithmetic.h"

namespace {
namespace fitting {

using squizd::Fit;
using squizd::LANES;
using squizd::MAX_GROUP;

// 16 groups side by side, in as many registers as that takes.
typedef float Lane __attribute__((vector_size(LANES * 4), may_alias));
typedef int32_t Whole __attribute__((vector_size(LANES * 4), may_alias));

INLINE Lane most(Lane x, Lane y) { return x > y ? x : y; }
INLINE Lane least(Lane x, Lane y) { return x < y ? x : y; }
INLINE Lane same(float x) { return Lane{} + x; }
INLINE Lane reciprocal(Lane x) { return x == Lane{} ? Lane{} : 1.0f / x; }

INLINE float bits_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
INLINE uint32_t float_as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

// `x` as the stored type has it, in float32.
INLINE float rounded(float x, Fit::Type type) {
  if (type == Fit::BF16) {
    uint32_t bits = float_as_bits(x);
    if (x != x) return bits_as_float((bits & 0xffff0000u) | 0x400000u);
    return bits_as_float((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u);
  }
  if (type == Fit::F16) {
    // Half a unit in the last place of float16 at this magnitude decides: adding and taking away a power of two rounds there.
    const uint32_t bits = float_as_bits(x), sign = bits & 0x80000000u;
    const float size = bits_as_float(bits & 0x7fffffffu);
    if (!(size < 65520.0f)) return size == size ? bits_as_float(sign | 0x7f800000u) : x;
    const uint32_t exponent = bits & 0x7f800000u, floor = 113u << 23;  // below 2^-14 steps are as large as there
    const float magic = bits_as_float((exponent > floor ? exponent : floor) + (13u << 23));
    volatile float sum = size + magic;  // the compiler must not see that this is almost `size`
    return bits_as_float(float_as_bits(sum - magic) | sign);
  }
  return x;
}
INLINE Lane rounded(Lane x, Fit::Type type) {
  for (int l = 0; l < LANES; l++) x[l] = rounded(x[l], type);
  return x;
}

struct Groups {
  Lane w[MAX_GROUP], centred[MAX_GROUP], weight[MAX_GROUP], decoded[MAX_GROUP];
  Lane power, mean;
  int size;
  float levels, share, top;  // share: 1 / (the weights' sum); top: where codes are cut off

  template <bool WEIGHTED>
  INLINE Lane term(Lane x, int i) const {
    return WEIGHTED ? x * weight[i] : x;
  }

  INLINE Lane code(Lane w, Lane edge, Lane inverse) const {
    const Lane x = least(most((w - edge) * inverse, Lane{}), same(top));
    return __builtin_convertvector(__builtin_convertvector(x, Whole), Lane);
  }

  // Gain, scale and bias of the best grid for the codes that (scale, bias) gives the centred weights.
  template <bool WEIGHTED>
  INLINE void least_squares(Lane scale, Lane inverse, Lane bias, Lane& gain, Lane& s, Lane& b) const {
    const Lane edge = bias - 0.5f * scale;
    Lane codes = {}, squares = {}, covariance = {};
    for (int i = 0; i < size; i++) {
      const Lane q = code(centred[i], edge, inverse);
      const Lane weighted = term<WEIGHTED>(q, i);
      codes += weighted;
      squares += weighted * q;
      covariance += weighted * centred[i];
    }
    const Lane middle = codes * share;
    s = covariance / most(squares - codes * middle, 1e-6f * squares + 1e-30f);
    gain = s * covariance;
    b = -s * middle;
  }

  // Weighted squared error of a grid with the nearest codes.
  template <bool WEIGHTED>
  INLINE Lane error(Lane scale, Lane bias) const {
    const Lane edge = bias - 0.5f * scale, inverse = reciprocal(scale);
    Lane found = {};
    for (int i = 0; i < size; i++) {
      const Lane difference = code(w[i], edge, inverse) * scale + bias - w[i];
      found += term<WEIGHTED>(difference * difference, i);
    }
    return found;
  }
};

struct Best {
  Lane error, scale, bias;
  Whole won;
};

template <bool WEIGHTED>
INLINE void offer_nearest(const Groups& g, Lane scale, Lane bias, Best& best) {
  const Lane error = g.error<WEIGHTED>(scale * g.power, bias * g.power);
  const Whole better = error < best.error;
  best.error = better ? error : best.error;
  best.scale = better ? scale : best.scale;
  best.bias = better ? bias : best.bias;
  best.won |= better;
}

template <bool WEIGHTED>
void search(const Fit& job, const Groups& g, Lane& scale, Lane& bias) {
  Lane lowest = g.centred[0], highest = lowest;
  for (int i = 1; i < g.size; i++) {
    lowest = least(g.centred[i], lowest);
    highest = most(g.centred[i], highest);
  }
  const Lane span = highest - lowest, step = (span > Lane{} ? span : same(1)) / g.levels;
  const float level = float(1.0 / double(g.levels));
  Lane best = same(-1), low = {}, high = {}, gain, s, b;
  auto fit = [&](Lane at_low, Lane width) {  // width: 1 - (low + high) / levels
    const Lane first = most(step * width, 0.1f * step);
    g.least_squares<WEIGHTED>(first, 1.0f / first, lowest + step * at_low, gain, s, b);
  };
  auto take = [&](Lane a, Lane c) {
    const Whole better = gain > best;
    best = better ? gain : best;
    low = better ? a : low;
    high = better ? c : high;
  };
  for (int i = 0; i < job.starts; i++)
    for (int j = 0; j < job.starts; j++) {
      fit(same(float(job.offsets[i])), same(float(1.0 - (job.offsets[i] + job.offsets[j]) * (1.0 / double(g.levels)))));
      take(same(float(job.offsets[i])), same(float(job.offsets[j])));
    }
  for (int r = 0; r < job.refinements; r++) {
    const Lane from_low = low, from_high = high;
    const float d = float(job.distances[r]), moves[3] = {-d, 0, d};
    for (int i = 0; i < 3; i++)
      for (int j = 0; j < 3; j++) {
        if (i == 1 && j == 1) continue;
        const Lane a = from_low + moves[i], c = from_high + moves[j];
        fit(a, 1.0f - (a + c) * level);
        take(a, c);
      }
  }
  fit(low, 1.0f - (low + high) * level);
  scale = s;
  bias = b;
  for (int round = 0; round < job.rounds; round++) {
    g.least_squares<WEIGHTED>(scale, 1.0f / most(scale, same(1e-30f)), bias, gain, s, b);
    scale = s;
    bias = b;
  }
}

template <bool WEIGHTED>
void fit_lanes(const Fit& job, Groups& g, Best& best, Lane stored_scale, Lane stored_bias) {
  if (WEIGHTED) {
    Lane top = g.weight[0], sum = {};
    for (int i = 1; i < g.size; i++) top = most(g.weight[i], top);
    for (int i = 0; i < g.size; i++) sum += g.weight[i] = top > Lane{} ? g.weight[i] / top : same(1);
    for (int i = 0; i < g.size; i++) g.weight[i] /= sum;
  }
  Lane sum = {};
  for (int i = 0; i < g.size; i++) sum += g.term<WEIGHTED>(g.w[i], i);
  g.mean = sum * g.share;
  for (int i = 0; i < g.size; i++) g.centred[i] = g.w[i] - g.mean;
  Lane scale, bias, plain = {};
  search<WEIGHTED>(job, g, scale, bias);
  for (int i = 0; i < g.size; i++) {
    const Lane difference = g.decoded[i] * g.power - g.w[i];
    plain += g.term<WEIGHTED>(difference * difference, i);
  }
  best = {most(plain * job.margin - 1e-30f, Lane{}), stored_scale, stored_bias, Whole{}};
  offer_nearest<WEIGHTED>(g, stored_scale, stored_bias, best);
  for (int n = 0; n < job.neighbours; n++) {
    const Lane s = rounded(scale * job.factors[n] / g.power, job.type), as_scaled = s * g.power;
    const Lane edge = (bias + g.mean) - 0.5f * as_scaled, inverse = reciprocal(as_scaled);
    Lane codes = {};
    for (int i = 0; i < g.size; i++) codes += g.term<WEIGHTED>(g.code(g.w[i], edge, inverse), i);
    offer_nearest<WEIGHTED>(g, s, rounded((g.mean - as_scaled * codes * g.share) / g.power, job.type), best);
  }
}

// Groups [first, first + count), count <= 16, of a job.
void fit(const Fit& job, size_t first, int count) {
  Groups g;
  Best best;
  Lane scales = {}, biases = {};
  g.size = job.group;
  g.levels = float((1 << job.bits) - 1);
  g.top = g.levels + 0.5f;
  g.share = job.weight ? 1.0f : float(1.0 / job.group);
  const size_t per_row = size_t(job.cols / job.group);
  for (int l = 0; l < LANES; l++) {
    const size_t n = first + size_t(l < count ? l : 0);
    const float* w = job.w + n * size_t(job.group);
    const float* decoded = job.decoded + n * size_t(job.group);
    uint32_t exponent = 0;
    for (int i = 0; i < job.group; i++) {
      const uint32_t size = float_as_bits(w[i]) & 0x7fffffffu;
      exponent = size > exponent ? size : exponent;
    }
    const int32_t power = int32_t(254u << 23) - int32_t(exponent & 0x7f800000u);
    g.power[l] = bits_as_float(uint32_t(power > (1 << 23) ? power : 1 << 23));
    for (int i = 0; i < job.group; i++) g.w[i][l] = w[i] * g.power[l];
    for (int i = 0; i < job.group; i++) g.decoded[i][l] = decoded[i];
    if (job.weight) {
      const size_t row = (job.first_row + n / per_row) / size_t(job.rows_per_weight);
      const float* weight = job.weight + row * size_t(job.cols) + n % per_row * size_t(job.group);
      for (int i = 0; i < job.group; i++) g.weight[i][l] = weight[i];
    }
    scales[l] = job.scales[n];
    biases[l] = job.biases[n];
  }
  if (job.weight)
    fit_lanes<true>(job, g, best, scales, biases);
  else
    fit_lanes<false>(job, g, best, scales, biases);
  const Lane scale = best.scale * g.power, edge = best.bias * g.power - 0.5f * scale, inverse = reciprocal(scale);
  for (int i = 0; i < job.group; i++) g.decoded[i] = g.code(g.w[i], edge, inverse);
  const size_t words = size_t(job.group) * size_t(job.bits) / 32;
  for (int l = 0; l < count; l++) {
    const size_t n = first + size_t(l);
    job.scales[n] = best.scale[l];
    job.biases[n] = best.bias[l];
    if (!best.won[l]) continue;  // the codes that are there stay
    uint64_t buffer = 0;
    int have = 0;
    uint32_t* out = job.codes + n * words;
    for (int i = 0; i < job.group; i++) {
      buffer |= uint64_t(uint32_t(g.decoded[i][l])) << have;
      have += job.bits;
      if (have >= 32) {
        *out++ = uint32_t(buffer);
        buffer >>= 32;
        have -= 32;
      }
    }
  }
}

}  // namespace fitting
}  // namespace
