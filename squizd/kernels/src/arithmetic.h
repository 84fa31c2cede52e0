// What the arithmetic offers to the threads that share out the work. Knows nothing of MLX, threads or memory.
//
// One definition of a dot product holds everywhere: 16 running sums, one fused multiply-add per number in
// the order of storage, added as a tree (i + i+8, i + i+4, i + i+2, i + i+1). It does not depend on how many rows are computed
// together, on threads, or on the instruction set, so neither do the bits of any result.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace squizd {

constexpr int LANES = 16;
constexpr int UNIT = 32;  // codes that are decoded together; every group size is a multiple

// How numbers of a row are arranged where a matrix of this kind is multiplied: `pack` brings them there.
enum Order { NATURAL = 0, EVEN_ODD = 1 };  // EVEN_ODD: in each 32, the 16 even places, then the 16 odd ones

enum Mode { AFFINE = 0, MXFP4 = 1, FLOATS = 2 };

// Rows of weights as MLX stores them: `codes` [rows, cols * bits / 32] words, `scales` and `biases`
// [rows, cols / group] (float32; MXFP4: one byte, no biases). FLOATS: `codes` are float32, any `cols`.
struct Matrix {
  const void* codes;
  const void* scales;
  const float* biases;
  int rows, cols, bits, group;
  Mode mode;

  Order order() const { return bits == 4 ? EVEN_ODD : NATURAL; }
  int padded() const { return (cols + LANES - 1) / LANES * LANES; }
  size_t row_bytes() const { return size_t(cols) * bits / 8; }
};

// Attention of some query rows over all keys: rows [first, first + count) of `heads` query heads that share
// a key head, numbered head by head. Strides in floats; the last dimension is dense.
struct Attention {
  const float *q, *k, *v;
  float* out;
  const void* mask;  // null, or bytes (bool) or floats (added)
  const float* sinks;  // null, or one per head: a score without a value
  ptrdiff_t q_head, q_row, k_row, v_row, out_head, out_row, mask_head, mask_row, mask_col;
  int queries, keys, width, value_width;  // queries per head; widths: multiples of 16
  bool causal, mask_is_bool;
  float scale;
};

// Affine blocks to fit, groups of `group` weights in rows of `cols`: quantizers/mse.py. `codes`, `scales` and `biases` are the
// min-max blocks', and become those that were found.
constexpr int MAX_GROUP = 128;
struct Fit {
  enum Type { F32, F16, BF16 };
  const float *w, *decoded;  // decoded: what the min-max blocks decode to
  uint32_t* codes;
  float *scales, *biases;
  const float* weight;  // null, or rows of `cols`, one for `rows_per_weight` rows of w, the first of which is row `first_row`
  size_t first_row, rows_per_weight;
  int cols, group, bits;
  Type type;  // of scales and biases as stored
  int starts, refinements, rounds, neighbours;
  const double *offsets, *distances;
  const float* factors;
  float margin;
};

constexpr int KEY_TILE = 256;
constexpr int QUERY_TILE = 24;
constexpr size_t TILE_FLOATS = 1 << 15;  // decoded weights that one thread holds, when rows are no longer than this

struct Arithmetic {
  const char* name;
  // dst[padded cols] from `count` numbers that lie `stride` apart, zeros after them
  void (*pack)(const float* src, ptrdiff_t stride, int count, Order order, float* dst);
  // y[i][n] for rows n in [first, last) of `w` and packed rows x[i], i < count; `tile`: tile_floats(w)
  void (*matmul)(const Matrix& w, int first, int last, const float* const* x, int count, float* const* y, float* tile);
  // gate[j] = silu(gate[j]) * up[j] for j in [first, last), stored in `order`; both bounds multiples of 32, or the end
  void (*swiglu)(float* gate, const float* up, int first, int last, Order order);
  void (*rms_norm)(const float* x, ptrdiff_t stride, const float* weight, int count, float eps, float* out);
  // `scratch`: attention_floats(a)
  void (*attend)(const Attention& a, int first, int count, float* scratch);
  // out[rows][cols] = codes as numbers, in natural order
  void (*dequantize)(const Matrix& w, int first, int last, float* out, float* tile);
  // groups [first, first + count), count up to LANES
  void (*fit)(const Fit& job, size_t first, int count);
};

inline int tile_rows(const Matrix& w) {
  size_t rows = TILE_FLOATS / size_t(w.padded()) / 4 * 4;
  return rows < 4 ? 4 : int(rows);
}
inline size_t tile_floats(const Matrix& w) { return size_t(tile_rows(w)) * w.padded(); }
inline size_t attention_floats(const Attention& a) {
  return size_t(QUERY_TILE) * (a.width + a.value_width + KEY_TILE + 2);
}

// The instruction sets that were compiled in, best first; null ends the list. `usable` asks the processor.
extern const Arithmetic* const ALL[];
bool usable(const Arithmetic& which);

}  // namespace squizd
