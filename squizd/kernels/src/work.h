// Whole layers, shared out over threads: a linear layer, linear layers of experts, a gated expert block, attention.
// Pointers and sizes only. Scratch that grows with the input comes from the caller: `*_floats` says how much.
#pragma once
#include "arithmetic.h"
#include "pool.h"

namespace squizd {

struct Engine {
  Pool& pool;
  const Arithmetic& math;
};

// y[i] = w x[i] for `count` rows. x[i] numbers lie `stride` apart.
void linear(Engine e, const Matrix& w, const float* const* x, ptrdiff_t stride, int count, float* const* y, float* scratch);
size_t linear_floats(const Matrix& w, int count);

// `experts` matrices of one shape one after another; pair p multiplies row rows[p] of x with expert ids[p].
// Ids must be below `experts`: `valid_ids` says so.
struct Experts {
  Matrix first;
  int count;
  Matrix at(int expert) const;
};
bool valid_ids(const uint32_t* ids, int pairs, int experts);

void expert_linear(Engine e, const Experts& w, const float* const* x, ptrdiff_t stride, const uint32_t* ids, int pairs,
                   float* const* y, float* scratch);
size_t expert_linear_floats(const Experts& w, int pairs);

// out[p] = down (silu(gate x) * up x), x being row p / choices of `tokens` rows; pairs = tokens * choices
void swiglu_experts(Engine e, const Experts& gate, const Experts& up, const Experts& down, const float* const* x,
                    ptrdiff_t stride, int tokens, int choices, const uint32_t* ids, float* out, float* scratch);
size_t swiglu_experts_floats(const Experts& gate, const Experts& down, int tokens, int choices);

// out[i] = row ids[i] of `w` as numbers; ids must be below w.rows
void embed(Engine e, const Matrix& w, const uint32_t* ids, int count, float* out);

// For every one of `groups` key heads: `heads` query heads with `a.queries` rows each; `place(group)` moves pointers.
template <class Place>
void attention(Engine e, int groups, int heads, const Attention& like, const Place& place) {
  const int rows = heads * like.queries, tiles = (rows + QUERY_TILE - 1) / QUERY_TILE;
  const size_t each = attention_floats(like);
  const double work = double(groups) * rows * like.keys * (like.width + like.value_width);
  e.pool.run(groups * tiles, work < 6e5, [&](int task, int worker) {
    // The last rows of a causal block have most to do: begin with them.
    const int first = (tiles - 1 - task / groups) * QUERY_TILE;
    const Attention a = place(task % groups);
    e.math.attend(a, first, rows - first < QUERY_TILE ? rows - first : QUERY_TILE, e.pool.tile(worker, each));
  });
}

}  // namespace squizd
