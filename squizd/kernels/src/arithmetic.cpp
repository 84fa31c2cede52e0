// The arithmetic, compiled once per instruction set (SQUIZD_AVX512, SQUIZD_AVX2, SQUIZD_NEON or none of them).
#include "simd.h"

#include "fit.h"

using namespace squizd;

namespace {

void pack(const float* src, ptrdiff_t stride, int count, Order order, float* dst) {
  int at = 0;
  if (stride == 1 && order == NATURAL) {
    memcpy(dst, src, size_t(count) * 4);
    at = count;
  } else if (stride == 1) {
    for (; at + UNIT <= count; at += UNIT) {
      V even, odd;
      split_even_odd(load(src + at), load(src + at + LANES), even, odd);
      store(dst + at, even);
      store(dst + at + LANES, odd);
    }
  } else {
    for (; at < count; at++) {
      int to = order == NATURAL ? at : at / UNIT * UNIT + at % 2 * LANES + at % UNIT / 2;
      dst[to] = src[at * stride];
    }
  }
  for (; at % LANES; at++) dst[at] = 0;
}

// -------------------------------------------------------------------------------------- decoding weights

struct Row {
  const uint8_t* codes;
  const float *scales, *biases;
  const uint8_t* exponents;
};
Row row(const Matrix& w, int n) {
  size_t groups = size_t(w.cols) / w.group;
  return {(const uint8_t*)w.codes + n * w.row_bytes(), (const float*)w.scales + n * groups,
          w.biases + (w.biases ? n * groups : 0), (const uint8_t*)w.scales + n * groups};
}

template <int BITS, bool FP>
INLINE void set(Decoder<BITS, FP>& d, const Row& r, int g) {
  if constexpr (FP)
    d.set(e8m0(r.exponents[g]), 0);
  else
    d.set(r.scales[g], r.biases[g]);
}

// Bytes of codes between use and prefetch, in storage order: a page.
constexpr int AHEAD = 4096;

// y[0..ROWS) = rows n.. of w times x. UNITS of a group; 0: as w says.
template <int BITS, bool FP, int UNITS, int ROWS>
INLINE void dot_rows(const Matrix& w, int n, const float* x, float* y) {
  V acc[ROWS];
  for (int i = 0; i < ROWS; i++) acc[i] = zero();
  Row r = row(w, n);
  const int groups = w.cols / w.group, units = UNITS ? UNITS : w.group / UNIT;
  const int bytes = units * 4 * BITS, groups_ahead = AHEAD / bytes;
  const size_t stride = w.row_bytes();
  // Rows lie one after another: what ROWS of them use in one group is prefetched as one stream per array.
  const uint8_t* next = r.codes + AHEAD;
  for (int g = 0; g < groups; g++, next += bytes * ROWS) {
    Decoder<BITS, FP> d[ROWS];
    for (int i = 0; i < ROWS; i++) set<BITS, FP>(d[i], r, i * groups);
    for (int i = 0; i < bytes * ROWS; i += 64) __builtin_prefetch(next + i);
    if constexpr (!FP) {
      __builtin_prefetch(r.scales++ + (ROWS - 1) * g + groups_ahead);
      __builtin_prefetch(r.biases++ + (ROWS - 1) * g + groups_ahead);
    } else
      r.exponents++;
    for (int u = 0; u < units; u++, r.codes += 4 * BITS, x += UNIT) {
      V xa = load(x), xb = load(x + LANES);
      for (int i = 0; i < ROWS; i++) {
        V a, b;
        d[i].unit(r.codes + i * stride, a, b);
        acc[i] = fma(xb, b, fma(xa, a, acc[i]));
      }
    }
  }
  if constexpr (ROWS == 4)
    sums4(acc, y);
  else
    for (int i = 0; i < ROWS; i++) y[i] = sum(acc[i]);
}

template <int BITS, bool FP, int UNITS>
void dots(const Matrix& w, int first, int last, const float* x, float* y) {
  int n = first;
  for (; n + 4 <= last; n += 4) dot_rows<BITS, FP, UNITS, 4>(w, n, x, y + n);
  for (; n < last; n++) dot_rows<BITS, FP, UNITS, 1>(w, n, x, y + n);
}

template <int BITS, bool FP>
void one(const Matrix& w, int first, int last, const float* x, float* y) {
  if (w.group == 64)
    dots<BITS, FP, 2>(w, first, last, x, y);
  else
    dots<BITS, FP, 0>(w, first, last, x, y);
}

template <int BITS, bool FP>
void decode(const Matrix& w, int first, int last, float* out) {
  const int groups = w.cols / w.group, units = w.group / UNIT;
  for (int n = first; n < last; n++) {
    Row r = row(w, n);
    for (int g = 0; g < groups; g++) {
      Decoder<BITS, FP> d;
      set<BITS, FP>(d, r, g);
      for (int u = 0; u < units; u++, r.codes += 4 * BITS, out += UNIT) {
        V a, b;
        d.unit(r.codes, a, b);
        store(out, a);
        store(out + LANES, b);
      }
    }
  }
}

#define FOR_BITS(call)                          \
  switch (w.mode == MXFP4 ? 0 : w.bits) {       \
    case 0: call(4, true); break;               \
    case 2: call(2, false); break;              \
    case 3: call(3, false); break;              \
    case 4: call(4, false); break;              \
    case 5: call(5, false); break;              \
    case 6: call(6, false); break;              \
    default: call(8, false);                    \
  }

// ---------------------------------------------------------------------------------- rows times decoded rows

// y[i][0..N) = x[i] . w rows; `length` numbers, a multiple of 16 but for the last row's `tail` in w
template <int M, int N>
INLINE void block(const float* const* x, const float* w, ptrdiff_t stride, int length, int tail, float* const* y, int to) {
  V acc[M][N];
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) acc[i][j] = zero();
  for (int k = 0; k < length; k += LANES) {
    V b[N];
    for (int j = 0; j < N; j++) b[j] = load(w + j * stride + k);
    for (int i = 0; i < M; i++) {
      V a = load(x[i] + k);
      for (int j = 0; j < N; j++) acc[i][j] = fma(a, b[j], acc[i][j]);
    }
  }
  if (tail) {
    V b[N];
    for (int j = 0; j < N; j++) b[j] = load_some(w + j * stride + length, tail);
    for (int i = 0; i < M; i++) {
      V a = load(x[i] + length);
      for (int j = 0; j < N; j++) acc[i][j] = fma(a, b[j], acc[i][j]);
    }
  }
  for (int i = 0; i < M; i++) {
    if constexpr (N == 4)
      sums4(acc[i], y[i] + to);
    else
      for (int j = 0; j < N; j++) y[i][to + j] = sum(acc[i][j]);
  }
}

template <int M>
INLINE void strip(const float* const* x, const float* w, ptrdiff_t stride, int length, int tail, int rows, float* const* y, int to) {
  int n = 0;
  for (; n + TILE_N <= rows; n += TILE_N) block<M, TILE_N>(x, w + n * stride, stride, length, tail, y, to + n);
  for (; n < rows; n++) block<M, 1>(x, w + n * stride, stride, length, tail, y, to + n);
}

// y[i][to + n] = x[i] . w[n] for `count` rows x and `rows` rows w of `cols` numbers
void multiply(const float* const* x, int count, const float* w, ptrdiff_t stride, int cols, int rows, float* const* y, int to) {
  const int tail = cols % LANES, length = cols - tail;
  int i = 0;
  for (; i + TILE_M <= count; i += TILE_M) strip<TILE_M>(x + i, w, stride, length, tail, rows, y + i, to);
  switch (count - i) {
#define REST(m) \
  case m: if constexpr (m < TILE_M) strip<m>(x + i, w, stride, length, tail, rows, y + i, to); break;
    REST(1) REST(2) REST(3) REST(4) REST(5)
#undef REST
    default: break;
  }
}

void matmul(const Matrix& w, int first, int last, const float* const* x, int count, float* const* y, float* tile) {
  if (w.mode == FLOATS) {
    const float* codes = (const float*)w.codes;
    const int rows = tile_rows(w);  // a tile's worth at a time stays in the cache for all of x
    for (int n = first; n < last; n += rows)
      multiply(x, count, codes + size_t(n) * w.cols, w.cols, w.cols, last - n < rows ? last - n : rows, y, n);
    return;
  }
  if (count == 1) {
#define CALL(bits, fp) one<bits, fp>(w, first, last, x[0], y[0])
    FOR_BITS(CALL)
#undef CALL
    return;
  }
  const int rows = tile_rows(w);
  for (int n = first; n < last; n += rows) {
    const int end = last - n < rows ? last : n + rows;
#define CALL(bits, fp) decode<bits, fp>(w, n, end, tile)
    FOR_BITS(CALL)
#undef CALL
    multiply(x, count, tile, w.cols, w.cols, end - n, y, n);
  }
}

void dequantize(const Matrix& w, int first, int last, float* out, float* tile) {
  for (int n = first; n < last; n++, out += w.cols) {
#define CALL(bits, fp) decode<bits, fp>(w, n, n + 1, tile)
    FOR_BITS(CALL)
#undef CALL
    for (int k = 0; k < w.cols; k++)
      out[k] = tile[w.order() == NATURAL ? k : k / UNIT * UNIT + k % 2 * LANES + k % UNIT / 2];
  }
}

// ------------------------------------------------------------------------------------ what lies in between

INLINE V silu_times(V g, V u) { return mul(div(g, add(all(1.f), exponential(mul(g, all(-1.f))))), u); }

void swiglu(float* gate, const float* up, int first, int last, Order order) {
  int j = first;
  for (; j + UNIT <= last; j += UNIT) {
    V a = silu_times(load(gate + j), load(up + j)), b = silu_times(load(gate + j + LANES), load(up + j + LANES));
    if (order == EVEN_ODD) {
      V even, odd;
      split_even_odd(a, b, even, odd);
      a = even, b = odd;
    }
    store(gate + j, a);
    store(gate + j + LANES, b);
  }
  for (; j < last; j += LANES) {  // a row of floats need not end with a unit; what follows it is never added
    int n = last - j < LANES ? last - j : LANES;
    float out[LANES];
    store(out, silu_times(load_some(gate + j, n), load_some(up + j, n)));
    memcpy(gate + j, out, size_t(n) * 4);
    if (n < LANES) memset(gate + j + n, 0, size_t(LANES - n) * 4);
  }
}

void rms_norm(const float* x, ptrdiff_t stride, const float* weight, int count, float eps, float* out) {
  if (stride != 1) {
    for (int i = 0; i < count; i++) out[i] = x[i * stride];
    x = out;
  }
  V acc = zero();
  int i = 0;
  for (; i + LANES <= count; i += LANES) {
    V a = load(x + i);
    acc = fma(a, a, acc);
  }
  if (i < count) {
    V a = load_some(x + i, count - i);
    acc = fma(a, a, acc);
  }
  const float factor = 1.f / sqrtf(sum(acc) / float(count) + eps);
  for (i = 0; i + LANES <= count; i += LANES) {
    V a = mul(load(x + i), all(factor));
    store(out + i, weight ? mul(a, load(weight + i)) : a);
  }
  for (; i < count; i++) out[i] = x[i] * factor * (weight ? weight[i] : 1.f);
}

// ------------------------------------------------------------------------------------------------ attention

// out[i][d] += sum over s of p[i][s] * v[s][d], one s after another
template <int M, int N>
INLINE void weigh(const float* const* p, const float* v, ptrdiff_t v_row, int keys, float* const* out, int d) {
  V acc[M][N];
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) acc[i][j] = load(out[i] + d + j * LANES);
  for (int s = 0; s < keys; s++) {
    V b[N];
    for (int j = 0; j < N; j++) b[j] = load(v + s * v_row + d + j * LANES);
    for (int i = 0; i < M; i++) {
      V a = all(p[i][s]);
      for (int j = 0; j < N; j++) acc[i][j] = fma(a, b[j], acc[i][j]);
    }
  }
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) store(out[i] + d + j * LANES, acc[i][j]);
}

constexpr int WIDE = TILE_N == 4 ? 4 : 2;
template <int M>
INLINE void weigh_rows(const float* const* p, const float* v, ptrdiff_t v_row, int keys, float* const* out, int width) {
  int d = 0;
  for (; d + WIDE * LANES <= width; d += WIDE * LANES) weigh<M, WIDE>(p, v, v_row, keys, out, d);
  for (; d < width; d += LANES) weigh<M, 1>(p, v, v_row, keys, out, d);
}

void mask_row(const Attention& a, int head, int row, int from, int count, float* scores) {
  if (a.mask_is_bool) {
    const uint8_t* m = (const uint8_t*)a.mask + head * a.mask_head + row * a.mask_row + from * a.mask_col;
    for (int s = 0; s < count; s++)
      if (!m[s * a.mask_col]) scores[s] = -3.40282347e38f;
  } else {
    const float* m = (const float*)a.mask + head * a.mask_head + row * a.mask_row + from * a.mask_col;
    for (int s = 0; s < count; s++) scores[s] += m[s * a.mask_col];
  }
}

// Tiles of keys start at multiples of KEY_TILE and keep a running maximum: a query's bits do not depend on
// which queries are computed beside it.
void attend(const Attention& a, int first, int count, float* scratch) {
  float *q = scratch, *out = q + QUERY_TILE * a.width, *scores = out + QUERY_TILE * a.value_width;
  float *top = scores + QUERY_TILE * KEY_TILE, *total = top + QUERY_TILE;
  const float* qs[QUERY_TILE];
  float *outs[QUERY_TILE], *rows[QUERY_TILE];
  int limit[QUERY_TILE], furthest = 0;
  for (int i = 0; i < count; i++) {
    const int head = (first + i) / a.queries, at = (first + i) % a.queries;
    const float* from = a.q + head * a.q_head + at * a.q_row;
    for (int d = 0; d < a.width; d += LANES) store(q + i * a.width + d, mul(load(from + d), all(a.scale)));
    for (int d = 0; d < a.value_width; d += LANES) store(out + i * a.value_width + d, zero());
    qs[i] = q + i * a.width, outs[i] = out + i * a.value_width, rows[i] = scores + i * KEY_TILE;
    top[i] = a.sinks ? a.sinks[head] : -3.40282347e38f;
    total[i] = a.sinks ? 1.f : 0.f;
    limit[i] = a.causal ? a.keys - a.queries + at + 1 : a.keys;
    if (limit[i] > furthest) furthest = limit[i];
  }
  for (int from = 0; from < furthest; from += KEY_TILE) {
    const int keys = furthest - from < KEY_TILE ? furthest - from : KEY_TILE;
    multiply(qs, count, a.k + from * a.k_row, a.k_row, a.width, keys, rows, 0);
    for (int i = 0; i < count; i++) {
      float* row = rows[i];
      int n = limit[i] - from < keys ? limit[i] - from : keys;
      if (n < 0) n = 0;
      if (a.mask && n) mask_row(a, (first + i) / a.queries, (first + i) % a.queries, from, n, row);
      for (int s = n; s < (keys + LANES - 1) / LANES * LANES; s++) row[s] = -INFINITY;
      V best = all(top[i]);
      for (int s = 0; s < keys; s += LANES) best = vmax(load(row + s), best);
      float lanes[LANES], high = top[i];
      store(lanes, best);
      for (int l = 0; l < LANES; l++) high = lanes[l] > high ? lanes[l] : high;
      V acc = zero();
      for (int s = 0; s < keys; s += LANES) {
        V e = exponential(add(load(row + s), all(-high)));
        store(row + s, e);
        acc = add(acc, e);
      }
      if (high != top[i]) {
        float shrink[LANES];
        store(shrink, exponential(all(top[i] - high)));
        total[i] *= shrink[0];
        for (int d = 0; d < a.value_width; d += LANES) store(outs[i] + d, mul(load(outs[i] + d), all(shrink[0])));
        top[i] = high;
      }
      total[i] += sum(acc);
    }
    const float* v = a.v + from * a.v_row;
    int i = 0;
    for (; i + TILE_M <= count; i += TILE_M) weigh_rows<TILE_M>(rows + i, v, a.v_row, keys, outs + i, a.value_width);
    for (; i < count; i++) weigh_rows<1>(rows + i, v, a.v_row, keys, outs + i, a.value_width);
  }
  for (int i = 0; i < count; i++) {
    const int head = (first + i) / a.queries, at = (first + i) % a.queries;
    float* to = a.out + head * a.out_head + at * a.out_row;
    for (int d = 0; d < a.value_width; d += LANES) store(to + d, div(load(outs[i] + d), all(total[i])));
  }
}

}  // namespace

namespace squizd {
#if defined(SQUIZD_AVX512)
#define TABLE avx512
#elif defined(SQUIZD_AVX2)
#define TABLE avx2
#elif defined(SQUIZD_NEON)
#define TABLE neon
#else
#define TABLE plain
#endif
extern const Arithmetic TABLE;
const Arithmetic TABLE = {ISA_NAME, pack, matmul, swiglu, rms_norm, attend, dequantize, fitting::fit};
}  // namespace squizd
