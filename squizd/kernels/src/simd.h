// Sixteen floats, on AVX-512, AVX2, NEON or none of them: exactly the operations that arithmetic.cpp needs.
// Compiled once per instruction set, so everything is in an unnamed namespace: no copy may win at link time.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "arithmetic.h"

#if defined(SQUIZD_AVX512) || defined(SQUIZD_AVX2)
#include <immintrin.h>
#elif defined(SQUIZD_NEON)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

// Where lane l of 16 codes of `bits` starts: byte l*bits/8 of the load, bit l*bits%8 of that.
template <int BITS>
struct Place {
  int32_t byte[16], shift[16];
  int8_t shuffle[2][64];  // for the first and second 16 of a unit: 4 bytes per lane
  int32_t back[16];       // negative shifts, for NEON
};
template <int BITS>
constexpr Place<BITS> make_place() {
  Place<BITS> p{};
  constexpr int whole = 4 * BITS;                       // bytes of a unit
  constexpr int load = whole / 2 > 8 ? 16 : 8;          // bytes that are loaded for each half
  constexpr int skip = 2 * BITS - (whole - load);       // the second half's load ends with the unit
  for (int l = 0; l < 16; l++) {
    p.byte[l] = l * BITS / 8;
    p.shift[l] = l * BITS % 8;
    p.back[l] = -p.shift[l];
    for (int j = 0; j < 4; j++) {
      int first = l * BITS / 8 + j, second = first + skip;
      p.shuffle[0][4 * l + j] = int8_t(first < load ? first : -1);
      p.shuffle[1][4 * l + j] = int8_t(second < load ? second : -1);
    }
  }
  return p;
}
template <int BITS>
alignas(64) constexpr Place<BITS> PLACE = make_place<BITS>();

alignas(64) constexpr float FP4[16] = {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};

INLINE float e8m0(uint8_t e) {
  uint32_t bits = e ? uint32_t(e) << 23 : 0x400000u;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

#if defined(SQUIZD_AVX512)
// ---------------------------------------------------------------------------------------------- AVX-512
#define ISA_NAME "AVX-512"
constexpr int TILE_M = 6, TILE_N = 4;
struct V {
  __m512 v;
};
INLINE V zero() { return {_mm512_setzero_ps()}; }
INLINE V all(float x) { return {_mm512_set1_ps(x)}; }
INLINE V load(const float* p) { return {_mm512_loadu_ps(p)}; }
INLINE V load_some(const float* p, int n) { return {_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p)}; }
INLINE void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
INLINE V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE V add(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE V mul(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE V div(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE V vmax(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
INLINE V vmin(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
INLINE V round_even(V a) { return {_mm512_roundscale_ps(a.v, 8)}; }
INLINE V ldexp_int(V a, V n) {
  __m512i e = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
  return {_mm512_mul_ps(a.v, _mm512_castsi512_ps(e))};
}
INLINE __m128 fold(V a) {  // 16 -> 4 sums
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  return _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
}
INLINE void split_even_odd(V a, V b, V& even, V& odd) {  // of 32 numbers
  const __m512i e = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i o = _mm512_add_epi32(e, _mm512_set1_epi32(1));
  even = {_mm512_permutex2var_ps(a.v, e, b.v)};
  odd = {_mm512_permutex2var_ps(a.v, o, b.v)};
}

template <int BITS>
INLINE __m512i half(const uint8_t* p, int which) {
  constexpr int whole = 4 * BITS;
  __m128i bytes;
  if constexpr (2 * BITS > 8)
    bytes = _mm_loadu_si128((const __m128i*)(which ? p + whole - 16 : p));
  else
    bytes = _mm_loadl_epi64((const __m128i*)(which ? p + whole - 8 : p));
  __m512i spread = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), _mm512_load_si512(PLACE<BITS>.shuffle[which]));
  return _mm512_srlv_epi32(spread, _mm512_load_si512(PLACE<BITS>.shift));
}

template <int BITS, bool FP>
struct Decoder {
  __m512 table, scale, bias;
  INLINE void set(float s, float b) {
    if constexpr (FP)
      table = _mm512_mul_ps(_mm512_load_ps(FP4), _mm512_set1_ps(s));
    else if constexpr (BITS <= 4) {  // a permutation looks at four bits of its index: repeat the table for fewer
      const __m512i code = _mm512_and_si512(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                            _mm512_set1_epi32((1 << BITS) - 1));
      table = _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), _mm512_set1_ps(s), _mm512_set1_ps(b));
    } else {
      scale = _mm512_set1_ps(s);
      bias = _mm512_set1_ps(b);
    }
  }
  INLINE void unit(const uint8_t* p, V& a, V& b) const {
    if constexpr (BITS == 4) {
      __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
      a = {_mm512_permutexvar_ps(bytes, table)};
      b = {_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table)};
    } else if constexpr (BITS < 4) {
      a = {_mm512_permutexvar_ps(half<BITS>(p, 0), table)};
      b = {_mm512_permutexvar_ps(half<BITS>(p, 1), table)};
    } else if constexpr (BITS == 8) {
      a = number(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
      b = number(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(p + 16))));
    } else {
      const __m512i mask = _mm512_set1_epi32((1 << BITS) - 1);
      a = number(_mm512_and_si512(half<BITS>(p, 0), mask));
      b = number(_mm512_and_si512(half<BITS>(p, 1), mask));
    }
  }
  INLINE V number(__m512i code) const { return {_mm512_fmadd_ps(_mm512_cvtepi32_ps(code), scale, bias)}; }
};

#elif defined(SQUIZD_AVX2)
// ------------------------------------------------------------------------------------------------- AVX2
#define ISA_NAME "AVX2"
constexpr int TILE_M = 2, TILE_N = 3;
struct V {
  __m256 l, h;
};
INLINE V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE V all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE V load_some(const float* p, int n) {
  float t[16] = {};
  memcpy(t, p, size_t(n) * 4);
  return load(t);
}
INLINE void store(float* p, V a) { _mm256_storeu_ps(p, a.l), _mm256_storeu_ps(p + 8, a.h); }
INLINE V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.l, b.l, c.l), _mm256_fmadd_ps(a.h, b.h, c.h)}; }
INLINE V add(V a, V b) { return {_mm256_add_ps(a.l, b.l), _mm256_add_ps(a.h, b.h)}; }
INLINE V mul(V a, V b) { return {_mm256_mul_ps(a.l, b.l), _mm256_mul_ps(a.h, b.h)}; }
INLINE V div(V a, V b) { return {_mm256_div_ps(a.l, b.l), _mm256_div_ps(a.h, b.h)}; }
INLINE V vmax(V a, V b) { return {_mm256_max_ps(a.l, b.l), _mm256_max_ps(a.h, b.h)}; }
INLINE V vmin(V a, V b) { return {_mm256_min_ps(a.l, b.l), _mm256_min_ps(a.h, b.h)}; }
INLINE V round_even(V a) { return {_mm256_round_ps(a.l, 8), _mm256_round_ps(a.h, 8)}; }
INLINE __m256 power(__m256 n) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE V ldexp_int(V a, V n) { return {_mm256_mul_ps(a.l, power(n.l)), _mm256_mul_ps(a.h, power(n.h))}; }
INLINE __m128 fold(V a) {
  __m256 h = _mm256_add_ps(a.l, a.h);
  return _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
}
INLINE void even_odd8(__m256 a, __m256 b, __m256& even, __m256& odd) {
  __m256 e = _mm256_shuffle_ps(a, b, 0x88), o = _mm256_shuffle_ps(a, b, 0xdd);  // pairs of 64 bits in order 0 2 1 3
  even = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(e), 0xd8));
  odd = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(o), 0xd8));
}
INLINE void split_even_odd(V a, V b, V& even, V& odd) {
  even_odd8(a.l, a.h, even.l, odd.l);
  even_odd8(b.l, b.h, even.h, odd.h);
}
template <int BITS>
INLINE __m256i quarter(__m128i bytes, int which, int part) {
  __m256i control = _mm256_load_si256((const __m256i*)(PLACE<BITS>.shuffle[which] + 32 * part));
  __m256i shift = _mm256_load_si256((const __m256i*)(PLACE<BITS>.shift + 8 * part));
  __m256i codes = _mm256_srlv_epi32(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), control), shift);
  return _mm256_and_si256(codes, _mm256_set1_epi32((1 << BITS) - 1));
}
template <int BITS, bool FP>
struct Decoder {
  __m256 scale, bias;
  INLINE void set(float s, float b) {
    if constexpr (FP)
      scale = _mm256_mul_ps(_mm256_load_ps(FP4), _mm256_set1_ps(s));  // the eight magnitudes
    else {
      scale = _mm256_set1_ps(s);
      bias = _mm256_set1_ps(b);
    }
  }
  INLINE __m256 number(__m256i code) const {
    if constexpr (FP) {  // the permutation looks at three bits; the fourth is the sign
      __m256 sign = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(8)), 28));
      return _mm256_xor_ps(_mm256_permutevar8x32_ps(scale, code), sign);
    } else
      return _mm256_fmadd_ps(_mm256_cvtepi32_ps(code), scale, bias);
  }
  INLINE void unit(const uint8_t* p, V& a, V& b) const {
    if constexpr (BITS == 4) {
      __m128i bytes = _mm_loadu_si128((const __m128i*)p);
      __m256i l = _mm256_cvtepu8_epi32(bytes), h = _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8));
      const __m256i mask = _mm256_set1_epi32(15);
      a = {number(_mm256_and_si256(l, mask)), number(_mm256_and_si256(h, mask))};
      b = {number(_mm256_srli_epi32(l, 4)), number(_mm256_srli_epi32(h, 4))};
    } else if constexpr (BITS == 8) {
      __m128i first = _mm_loadu_si128((const __m128i*)p), second = _mm_loadu_si128((const __m128i*)(p + 16));
      a = {number(_mm256_cvtepu8_epi32(first)), number(_mm256_cvtepu8_epi32(_mm_srli_si128(first, 8)))};
      b = {number(_mm256_cvtepu8_epi32(second)), number(_mm256_cvtepu8_epi32(_mm_srli_si128(second, 8)))};
    } else {
      constexpr int whole = 4 * BITS;
      __m128i first, second;
      if constexpr (2 * BITS > 8) {
        first = _mm_loadu_si128((const __m128i*)p);
        second = _mm_loadu_si128((const __m128i*)(p + whole - 16));
      } else {
        first = _mm_loadl_epi64((const __m128i*)p);
        second = _mm_loadl_epi64((const __m128i*)(p + whole - 8));
      }
      a = {number(quarter<BITS>(first, 0, 0)), number(quarter<BITS>(first, 0, 1))};
      b = {number(quarter<BITS>(second, 1, 0)), number(quarter<BITS>(second, 1, 1))};
    }
  }
};

#elif defined(SQUIZD_NEON)
// ------------------------------------------------------------------------------------------------- NEON
#define ISA_NAME "NEON"
constexpr int TILE_M = 2, TILE_N = 3;
struct V {
  float32x4_t q[4];
};
#define EACH(expr) \
  V r;             \
  for (int i = 0; i < 4; i++) r.q[i] = expr; \
  return r
INLINE V all(float x) { EACH(vdupq_n_f32(x)); }
INLINE V zero() { return all(0); }
INLINE V load(const float* p) { EACH(vld1q_f32(p + 4 * i)); }
INLINE V load_some(const float* p, int n) {
  float t[16] = {};
  memcpy(t, p, size_t(n) * 4);
  return load(t);
}
INLINE void store(float* p, V a) {
  for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.q[i]);
}
INLINE V fma(V a, V b, V c) { EACH(vfmaq_f32(c.q[i], a.q[i], b.q[i])); }
INLINE V add(V a, V b) { EACH(vaddq_f32(a.q[i], b.q[i])); }
INLINE V mul(V a, V b) { EACH(vmulq_f32(a.q[i], b.q[i])); }
INLINE V div(V a, V b) { EACH(vdivq_f32(a.q[i], b.q[i])); }
INLINE V vmax(V a, V b) { EACH(vbslq_f32(vcgtq_f32(a.q[i], b.q[i]), a.q[i], b.q[i])); }
INLINE V vmin(V a, V b) { EACH(vbslq_f32(vcltq_f32(a.q[i], b.q[i]), a.q[i], b.q[i])); }
INLINE V round_even(V a) { EACH(vrndnq_f32(a.q[i])); }
INLINE V ldexp_int(V a, V n) {
  EACH(vmulq_f32(a.q[i], vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.q[i]), vdupq_n_s32(127)), 23))));
}
INLINE float32x4_t fold(V a) { return vaddq_f32(vaddq_f32(a.q[0], a.q[2]), vaddq_f32(a.q[1], a.q[3])); }
INLINE void split_even_odd(V a, V b, V& even, V& odd) {
  for (int i = 0; i < 2; i++) {
    even.q[i] = vuzp1q_f32(a.q[2 * i], a.q[2 * i + 1]);
    odd.q[i] = vuzp2q_f32(a.q[2 * i], a.q[2 * i + 1]);
    even.q[2 + i] = vuzp1q_f32(b.q[2 * i], b.q[2 * i + 1]);
    odd.q[2 + i] = vuzp2q_f32(b.q[2 * i], b.q[2 * i + 1]);
  }
}
template <int BITS, bool FP>
struct Decoder {
  float32x4_t scale, bias;
  INLINE void set(float s, float b) {
    scale = vdupq_n_f32(FP ? .5f * s : s);
    bias = vdupq_n_f32(b);
  }
  INLINE V numbers(uint8x16_t codes) const {  // 16 whole bytes, one code each
    V r;
    if constexpr (FP) {
      static const int8_t doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
      int8x16_t v = vqtbl1q_s8(vld1q_s8(doubled), codes);
      int16x8_t l = vmovl_s8(vget_low_s8(v)), h = vmovl_s8(vget_high_s8(v));
      int32x4_t w[4] = {vmovl_s16(vget_low_s16(l)), vmovl_s16(vget_high_s16(l)), vmovl_s16(vget_low_s16(h)), vmovl_s16(vget_high_s16(h))};
      for (int i = 0; i < 4; i++) r.q[i] = vmulq_f32(vcvtq_f32_s32(w[i]), scale);
    } else {
      uint16x8_t l = vmovl_u8(vget_low_u8(codes)), h = vmovl_u8(vget_high_u8(codes));
      uint32x4_t w[4] = {vmovl_u16(vget_low_u16(l)), vmovl_u16(vget_high_u16(l)), vmovl_u16(vget_low_u16(h)), vmovl_u16(vget_high_u16(h))};
      for (int i = 0; i < 4; i++) r.q[i] = vfmaq_f32(bias, vcvtq_f32_u32(w[i]), scale);
    }
    return r;
  }
  INLINE V spread(const uint8_t* p, int which) const {
    constexpr int whole = 4 * BITS;
    uint8x16_t bytes;
    if constexpr (2 * BITS > 8)
      bytes = vld1q_u8(which ? p + whole - 16 : p);
    else
      bytes = vcombine_u8(vld1_u8(which ? p + whole - 8 : p), vdup_n_u8(0));
    V r;
    for (int i = 0; i < 4; i++) {
      uint8x16_t lane = vqtbl1q_u8(bytes, vld1q_u8((const uint8_t*)PLACE<BITS>.shuffle[which] + 16 * i));
      uint32x4_t code = vshlq_u32(vreinterpretq_u32_u8(lane), vld1q_s32(PLACE<BITS>.back + 4 * i));
      r.q[i] = vfmaq_f32(bias, vcvtq_f32_u32(vandq_u32(code, vdupq_n_u32((1u << BITS) - 1))), scale);
    }
    return r;
  }
  INLINE void unit(const uint8_t* p, V& a, V& b) const {
    if constexpr (BITS == 4) {
      uint8x16_t bytes = vld1q_u8(p);
      a = numbers(vandq_u8(bytes, vdupq_n_u8(15)));
      b = numbers(vshrq_n_u8(bytes, 4));
    } else if constexpr (BITS == 8) {
      a = numbers(vld1q_u8(p));
      b = numbers(vld1q_u8(p + 16));
    } else {
      a = spread(p, 0);
      b = spread(p, 1);
    }
  }
};

#else
// ------------------------------------------------------------------------------------------- plain C++
#define ISA_NAME "plain"
constexpr int TILE_M = 2, TILE_N = 2;
struct V {
  float f[16];
};
#define EACH(expr) \
  V r;             \
  for (int i = 0; i < 16; i++) r.f[i] = expr; \
  return r
INLINE V all(float x) { EACH(x); }
INLINE V zero() { return all(0); }
INLINE V load(const float* p) { EACH(p[i]); }
INLINE V load_some(const float* p, int n) { EACH(i < n ? p[i] : 0.f); }
INLINE void store(float* p, V a) { memcpy(p, a.f, 64); }
INLINE V fma(V a, V b, V c) { EACH(fmaf(a.f[i], b.f[i], c.f[i])); }
INLINE V add(V a, V b) { EACH(a.f[i] + b.f[i]); }
INLINE V mul(V a, V b) { EACH(a.f[i] * b.f[i]); }
INLINE V div(V a, V b) { EACH(a.f[i] / b.f[i]); }
INLINE V vmax(V a, V b) { EACH(a.f[i] > b.f[i] ? a.f[i] : b.f[i]); }
INLINE V vmin(V a, V b) { EACH(a.f[i] < b.f[i] ? a.f[i] : b.f[i]); }
INLINE V round_even(V a) { EACH(rintf(a.f[i])); }
INLINE float power(float n) {
  int32_t bits = int32_t(uint32_t(int(n) + 127) << 23);
  float out;
  memcpy(&out, &bits, 4);
  return out;
}
INLINE V ldexp_int(V a, V n) { EACH(a.f[i] * power(n.f[i])); }
struct Four {
  float f[4];
};
INLINE Four fold(V a) {
  Four r;
  for (int i = 0; i < 4; i++) r.f[i] = (a.f[i] + a.f[i + 8]) + (a.f[i + 4] + a.f[i + 12]);
  return r;
}
INLINE void split_even_odd(V a, V b, V& even, V& odd) {
  for (int i = 0; i < 8; i++) {
    even.f[i] = a.f[2 * i], odd.f[i] = a.f[2 * i + 1];
    even.f[8 + i] = b.f[2 * i], odd.f[8 + i] = b.f[2 * i + 1];
  }
}
template <int BITS, bool FP>
struct Decoder {
  float scale, bias;
  INLINE void set(float s, float b) { scale = s, bias = b; }
  INLINE float number(uint32_t code) const { return FP ? FP4[code & 15] * scale : fmaf(float(code), scale, bias); }
  INLINE void unit(const uint8_t* p, V& a, V& b) const {
    for (int i = 0; i < 32; i++) {
      int at = i * BITS / 8, shift = i * BITS % 8;
      uint32_t two = p[at] | (shift + BITS > 8 ? uint32_t(p[at + 1]) << 8 : 0u);
      float w = number(two >> shift & ((1u << BITS) - 1));
      if (BITS == 4)
        (i % 2 ? b : a).f[i / 2] = w;
      else
        (i < 16 ? a : b).f[i % 16] = w;
    }
  }
};
#endif

// ---------------------------------------------------------------------- what follows from these, for all

#if defined(SQUIZD_AVX512) || defined(SQUIZD_AVX2)
INLINE void sums4(const V* a, float* out) {
  __m128 r0 = fold(a[0]), r1 = fold(a[1]), r2 = fold(a[2]), r3 = fold(a[3]);
  _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
  _mm_storeu_ps(out, _mm_add_ps(_mm_add_ps(r0, r2), _mm_add_ps(r1, r3)));
}
INLINE float sum(V a) {
  float f[4];
  _mm_storeu_ps(f, fold(a));
  return (f[0] + f[2]) + (f[1] + f[3]);
}
#else
INLINE float sum(V a) {
  auto four = fold(a);
  float f[4];
  memcpy(f, &four, 16);
  return (f[0] + f[2]) + (f[1] + f[3]);
}
INLINE void sums4(const V* a, float* out) {
  for (int i = 0; i < 4; i++) out[i] = sum(a[i]);
}
#endif

// e^x to 2 ulp: x = n ln 2 + r, a polynomial in r (Cephes' coefficients), times 2^n. Below -87.3 it is 0.
INLINE V exponential(V x) {
  x = vmin(all(88.7f), vmax(all(-104.f), x));  // in this order NaN stays NaN
  V n = round_even(mul(x, all(1.44269504088896341f)));
  n = vmax(vmin(n, all(127.f)), all(-127.f));
  V r = fma(n, all(-0.693359375f), x);
  r = fma(n, all(2.12194440e-4f), r);
  V p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = add(fma(mul(r, r), p, r), all(1.f));
  return ldexp_int(p, n);
}

}  // namespace
