#include "work.h"

#include <string.h>

namespace squizd {
namespace {

// Work below this many microseconds (at some 10 GB/s and 50 GFLOP/s a thread) is not worth another thread's waking.
constexpr double ALONE_MICROSECONDS = 100;
double cost(const Matrix& w, double matrices, double products) {
  return (matrices * double(w.rows) * double(w.row_bytes()) * 1.25) / 10e3 + products * w.rows * double(w.cols) / 25e3;
}

int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Rows of output that one task computes, so that there are some tasks per worker. Multiples of 32: see `swiglu`.
int slice(const Pool& pool, int rows, int matrices) {
  const int wanted = pool.workers() * 4;
  const int parts = matrices >= wanted ? 1 : (wanted + matrices - 1) / matrices;
  const int size = round_up((rows + parts - 1) / parts, UNIT);
  return size < 64 ? (rows < 64 ? round_up(rows, UNIT) : 64) : size;
}

// Pairs sorted by expert: those of the i-th used expert are order[start[i]..start[i + 1]).
struct Groups {
  int *order, *expert, *start;
  int used;
};
size_t groups_floats(int pairs, int experts) {
  const size_t most = size_t(pairs < experts ? pairs : experts);
  return size_t(pairs) + 2 * most + 1 + size_t(experts) + 1;
}
Groups group(const uint32_t* ids, int pairs, int experts, int* memory) {
  const int most = pairs < experts ? pairs : experts;
  Groups g{memory, memory + pairs, memory + pairs + most, 0};
  int* next = memory + pairs + 2 * most + 1;
  if (pairs <= 64) {  // clearing a counter per expert costs more than looking
    int at = 0;
    for (int p = 0; p < pairs; p++) {
      bool seen = false;
      for (int i = 0; i < g.used && !seen; i++) seen = g.expert[i] == int(ids[p]);
      if (seen) continue;
      g.expert[g.used] = int(ids[p]);
      g.start[g.used++] = at;
      for (int q = p; q < pairs; q++)
        if (ids[q] == ids[p]) g.order[at++] = q;
    }
    g.start[g.used] = at;
    return g;
  }
  memset(next, 0, size_t(experts + 1) * sizeof(int));
  for (int p = 0; p < pairs; p++) next[ids[p] + 1]++;
  for (int i = 0; i < experts; i++) {
    if (next[i + 1]) {
      g.expert[g.used] = i;
      g.start[g.used++] = next[i];
    }
    next[i + 1] += next[i];
  }
  g.start[g.used] = pairs;
  for (int p = 0; p < pairs; p++) g.order[next[ids[p]]++] = p;
  return g;
}

// A bump pointer over the caller's scratch; every piece starts on a cache line.
struct Scratch {
  float* at;
  float* floats(size_t n) {
    float* p = at;
    at += (n + 15) / 16 * 16;
    return p;
  }
  template <class T>
  T* of(size_t n) {
    return reinterpret_cast<T*>(floats(n * sizeof(T) / sizeof(float) + 1));
  }
};
constexpr size_t SLACK = 16 * 16;
size_t pointers(size_t n) { return n * sizeof(void*) / sizeof(float); }
size_t max(size_t a, size_t b) { return a > b ? a : b; }

}  // namespace

bool valid_ids(const uint32_t* ids, int pairs, int experts) {
  uint32_t highest = 0;
  for (int p = 0; p < pairs; p++) highest = ids[p] > highest ? ids[p] : highest;
  return pairs == 0 || highest < uint32_t(experts);
}

Matrix Experts::at(int expert) const {
  Matrix m = first;
  const size_t rows = size_t(expert) * size_t(m.rows), groups = m.group ? size_t(m.cols / m.group) : 0;
  m.codes = static_cast<const char*>(m.codes) + rows * m.row_bytes();
  if (m.scales) m.scales = static_cast<const char*>(m.scales) + rows * groups * (m.mode == MXFP4 ? 1 : 4);
  if (m.biases) m.biases += rows * groups;
  return m;
}

size_t linear_floats(const Matrix& w, int count) {
  return size_t(count) * size_t(w.padded()) + pointers(size_t(count)) + SLACK;
}

void embed(Engine e, const Matrix& w, const uint32_t* ids, int count, float* out) {
  constexpr int PART = 64;
  e.pool.run((count + PART - 1) / PART, count < 256, [&](int task, int worker) {
    float* tile = e.pool.tile(worker, tile_floats(w));
    for (int i = task * PART; i < count && i < (task + 1) * PART; i++)
      e.math.dequantize(w, int(ids[i]), int(ids[i]) + 1, out + size_t(i) * size_t(w.cols), tile);
  });
}

void linear(Engine e, const Matrix& w, const float* const* x, ptrdiff_t stride, int count, float* const* y, float* scratch) {
  Scratch memory{scratch};
  const size_t width = size_t(w.padded()), tile = tile_floats(w);
  float* packed = memory.floats(size_t(count) * width);
  const float** rows = memory.of<const float*>(size_t(count));
  for (int i = 0; i < count; i++) {
    rows[i] = packed + size_t(i) * width;
    e.math.pack(x[i], stride, w.cols, w.order(), packed + size_t(i) * width);
  }
  const int part = slice(e.pool, w.rows, 1);
  e.pool.run((w.rows + part - 1) / part, cost(w, 1, count) < ALONE_MICROSECONDS, [&](int task, int worker) {
    const int first = task * part, last = first + part < w.rows ? first + part : w.rows;
    e.math.matmul(w, first, last, rows, count, y, e.pool.tile(worker, tile));
  });
}

size_t expert_linear_floats(const Experts& w, int pairs) {
  return linear_floats(w.first, pairs) + groups_floats(pairs, w.count) + pointers(size_t(pairs)) + SLACK;
}

void expert_linear(Engine e, const Experts& w, const float* const* x, ptrdiff_t stride, const uint32_t* ids, int pairs,
                   float* const* y, float* scratch) {
  Scratch memory{scratch};
  const size_t width = size_t(w.first.padded()), tile = tile_floats(w.first);
  const Groups g = group(ids, pairs, w.count, memory.of<int>(groups_floats(pairs, w.count)));
  float* packed = memory.floats(size_t(pairs) * width);
  const float** rows = memory.of<const float*>(size_t(pairs));
  float** outs = memory.of<float*>(size_t(pairs));
  for (int i = 0; i < pairs; i++) {  // in the order of experts
    const int p = g.order[i];
    rows[i] = i && x[p] == x[g.order[i - 1]] ? rows[i - 1] : packed + size_t(i) * width;
    if (rows[i] == packed + size_t(i) * width) e.math.pack(x[p], stride, w.first.cols, w.first.order(), packed + size_t(i) * width);
    outs[i] = y[p];
  }
  const int part = slice(e.pool, w.first.rows, g.used), parts = (w.first.rows + part - 1) / part;
  e.pool.run(g.used * parts, cost(w.first, g.used, pairs) < ALONE_MICROSECONDS, [&](int task, int worker) {
    const int i = task / parts, first = task % parts * part, last = first + part < w.first.rows ? first + part : w.first.rows;
    e.math.matmul(w.at(g.expert[i]), first, last, rows + g.start[i], g.start[i + 1] - g.start[i], outs + g.start[i],
                  e.pool.tile(worker, tile));
  });
}

size_t swiglu_experts_floats(const Experts& gate, const Experts& down, int tokens, int choices) {
  const int pairs = tokens * choices;
  return 2 * size_t(tokens) * size_t(gate.first.padded()) + 2 * size_t(pairs) * size_t(down.first.padded()) +
         6 * pointers(size_t(pairs)) + groups_floats(pairs, gate.count) + SLACK;
}

void swiglu_experts(Engine e, const Experts& gate, const Experts& up, const Experts& down, const float* const* x,
                    ptrdiff_t stride, int tokens, int choices, const uint32_t* ids, float* out, float* scratch) {
  Scratch memory{scratch};
  const int pairs = tokens * choices, inner = gate.first.rows, outer = down.first.rows;
  const size_t width = size_t(gate.first.padded()), hidden = size_t(down.first.padded());
  const size_t tile = max(max(tile_floats(gate.first), tile_floats(up.first)), tile_floats(down.first));
  const Groups g = group(ids, pairs, gate.count, memory.of<int>(groups_floats(pairs, gate.count)));
  const bool alike = gate.first.order() == up.first.order();
  float* packed = memory.floats(size_t(tokens) * width);
  float* packed_up = alike ? packed : memory.floats(size_t(tokens) * width);
  float *gates = memory.floats(size_t(pairs) * hidden), *ups = memory.floats(size_t(pairs) * hidden);
  const float **rows = memory.of<const float*>(size_t(pairs)), **rows_up = memory.of<const float*>(size_t(pairs));
  const float** inners = memory.of<const float*>(size_t(pairs));
  float **to_gate = memory.of<float*>(size_t(pairs)), **to_up = memory.of<float*>(size_t(pairs)), **outs = memory.of<float*>(size_t(pairs));
  for (int t = 0; t < tokens; t++) {
    e.math.pack(x[t], stride, gate.first.cols, gate.first.order(), packed + size_t(t) * width);
    if (!alike) e.math.pack(x[t], stride, up.first.cols, up.first.order(), packed_up + size_t(t) * width);
  }
  for (int i = 0; i < pairs; i++) {
    const int p = g.order[i], token = p / choices;
    rows[i] = packed + size_t(token) * width;
    rows_up[i] = packed_up + size_t(token) * width;
    to_gate[i] = gates + size_t(i) * hidden;
    to_up[i] = ups + size_t(i) * hidden;
    inners[i] = to_gate[i];
    outs[i] = out + size_t(p) * size_t(outer);
  }
  const bool alone = cost(gate.first, 3 * g.used, 3 * pairs) < ALONE_MICROSECONDS;
  const int part = slice(e.pool, inner, g.used), parts = (inner + part - 1) / part;
  e.pool.run(g.used * parts, alone, [&](int task, int worker) {
    const int i = task / parts, first = task % parts * part, last = first + part < inner ? first + part : inner;
    const int from = g.start[i], count = g.start[i + 1] - from, expert = g.expert[i];
    float* mine = e.pool.tile(worker, tile);
    e.math.matmul(gate.at(expert), first, last, rows + from, count, to_gate + from, mine);
    e.math.matmul(up.at(expert), first, last, rows_up + from, count, to_up + from, mine);
    for (int r = from; r < from + count; r++) e.math.swiglu(to_gate[r], to_up[r], first, last, down.first.order());
  });
  const int part2 = slice(e.pool, outer, g.used), parts2 = (outer + part2 - 1) / part2;
  e.pool.run(g.used * parts2, alone, [&](int task, int worker) {
    const int i = task / parts2, first = task % parts2 * part2, last = first + part2 < outer ? first + part2 : outer;
    const int from = g.start[i];
    e.math.matmul(down.at(g.expert[i]), first, last, inners + from, g.start[i + 1] - from, outs + from,
                  e.pool.tile(worker, tile));
  });
}

}  // namespace squizd
