// The kernels without Python or MLX, for sanitizers and emulators: every encoding over exact-size buffers, against
// double precision, and the same bits from every instruction set. `make sanitize`, `make check-neon`.
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../squizd/kernels/src/codes.h"
#include "../../squizd/kernels/src/shelf.h"
#include "../../squizd/kernels/src/work.h"

using namespace squizd;

namespace {

std::mt19937 random_bits(1);
float number() { return float(random_bits() % 2001) / 1000.f - 1.f; }
int failures = 0;
void expect(bool good, const char* what, const char* set, int a, int b, int c) {
  if (good) return;
  printf("FAILED: %s on %s (%d, %d, %d)\n", what, set, a, b, c);
  failures++;
}

// A heap block of exactly the size asked for, so that a sanitizer sees every byte too many.
template <class T>
std::vector<T> exact(size_t n) {
  std::vector<T> v(n);
  v.shrink_to_fit();
  return v;
}

struct Weights {
  std::vector<uint8_t> codes, exponents;
  std::vector<float> scales, biases, plain;
  Matrix matrix;
  int count;
  Weights(Mode mode, int bits, int group, int count, int rows, int cols) : count(count) {
    const size_t all = size_t(count) * rows * cols;
    if (mode == FLOATS) {
      plain = exact<float>(all);
      for (auto& w : plain) w = number();
      matrix = {plain.data(), nullptr, nullptr, rows, cols, 32, 0, FLOATS};
      return;
    }
    codes = exact<uint8_t>(all * bits / 8);
    for (auto& c : codes) c = uint8_t(random_bits());
    const size_t groups = all / group;
    if (mode == AFFINE) {
      scales = exact<float>(groups), biases = exact<float>(groups);
      for (size_t i = 0; i < groups; i++) scales[i] = number() / float(1 << bits), biases[i] = number();
    } else {
      exponents = exact<uint8_t>(groups);
      for (auto& e : exponents) e = uint8_t(120 + random_bits() % 10);
    }
    matrix = {codes.data(), mode == AFFINE ? (void*)scales.data() : exponents.data(), mode == AFFINE ? biases.data() : nullptr,
              rows, cols, bits, group, mode};
    plain.resize(all);
    static const float fp4[8] = {0, .5f, 1, 1.5f, 2, 3, 4, 6};
    for (size_t i = 0; i < all; i++) {
      uint32_t code = 0;
      for (int b = 0; b < bits; b++) code |= uint32_t(codes[(i * bits + b) / 8] >> ((i * bits + b) % 8) & 1) << b;
      plain[i] = mode == AFFINE ? fmaf(float(code), scales[i / group], biases[i / group])
                                : (code & 8 ? -1.f : 1.f) * fp4[code & 7] * ldexpf(1.f, int(exponents[i / group]) - 127);
    }
  }
  Experts experts() const { return {matrix, count}; }
};

std::vector<float> floats(size_t n) {
  auto v = exact<float>(n);
  for (auto& x : v) x = number();
  return v;
}
template <class T>
std::vector<T*> rows(std::vector<std::remove_const_t<T>>& v, size_t width) {
  std::vector<T*> r;
  for (size_t at = 0; at < v.size(); at += width) r.push_back(v.data() + at);
  return r;
}

using Result = std::vector<float>;

void check_layer(Pool& pool, Mode mode, int bits, int group, int count, int outputs, int cols) {
  Weights w(mode, bits, group, 5, outputs, cols);
  auto x = floats(size_t(count) * cols);
  auto xs = rows<const float>(x, size_t(cols));
  auto ids = exact<uint32_t>(size_t(count));
  for (auto& id : ids) id = random_bits() % 5;
  Result first;
  for (auto* const* set = ALL; *set; set++) {
    if (!usable(**set)) continue;
    Result y = exact<float>(size_t(count) * outputs), scratch = exact<float>(expert_linear_floats(w.experts(), count));
    auto ys = rows<float>(y, size_t(outputs));
    expert_linear({pool, **set}, w.experts(), xs.data(), 1, ids.data(), count, ys.data(), scratch.data());
    for (int i = 0; i < count; i++)
      for (int n = 0; n < outputs; n++) {
        double sum = 0, size = 0;
        for (int k = 0; k < cols; k++) {
          const double term = double(x[size_t(i) * cols + k]) * w.plain[(size_t(ids[i]) * outputs + n) * cols + k];
          sum += term, size += fabs(term);
        }
        if (!(fabs(y[size_t(i) * outputs + n] - sum) <= 1e-5 * size + 1e-30)) {
          expect(false, "value", (*set)->name, bits, group, cols);
          return;
        }
      }
    if (first.empty())
      first = y;
    else
      expect(!memcmp(first.data(), y.data(), y.size() * 4), "bits", (*set)->name, bits, group, cols);
    Result one = exact<float>(size_t(outputs)), little = exact<float>(linear_floats(w.matrix, 1));
    float* to = one.data();
    linear({pool, **set}, w.experts().at(int(ids[0])), xs.data(), 1, 1, &to, little.data());
    expect(!memcmp(one.data(), y.data(), one.size() * 4), "one row", (*set)->name, bits, group, cols);
    if (mode != FLOATS) {
      const uint32_t last = uint32_t(outputs - 1);
      Result row = exact<float>(size_t(cols));
      embed({pool, **set}, w.matrix, &last, 1, row.data());
      bool same = true;  // as numbers: NEON has no minus zero here
      for (int k = 0; k < cols; k++) same &= row[size_t(k)] == w.plain[size_t(last) * cols + k];
      expect(same, "embed", (*set)->name, bits, group, cols);
    }
  }
}

void check_block(Pool& pool, Mode mode, int bits, int group, int tokens, int choices, int inner, int outer) {
  Weights gate(mode, bits, group, 6, inner, outer), up(AFFINE, 8, 32, 6, inner, outer), down(mode, bits, group, 6, outer, inner);
  auto x = floats(size_t(tokens) * outer);
  auto xs = rows<const float>(x, size_t(outer));
  auto ids = exact<uint32_t>(size_t(tokens) * choices);
  for (auto& id : ids) id = random_bits() % 6;
  expect(valid_ids(ids.data(), int(ids.size()), 6), "valid ids", "", 0, 0, 0);
  ids.back() = 6;
  expect(!valid_ids(ids.data(), int(ids.size()), 6), "hostile ids", "", 0, 0, 0);
  ids.back() = 5;
  Result first;
  for (auto* const* set = ALL; *set; set++) {
    if (!usable(**set)) continue;
    Result y = exact<float>(ids.size() * outer), scratch = exact<float>(swiglu_experts_floats(gate.experts(), down.experts(), tokens, choices));
    swiglu_experts({pool, **set}, gate.experts(), up.experts(), down.experts(), xs.data(), 1, tokens, choices, ids.data(), y.data(), scratch.data());
    if (first.empty())
      first = y;
    else
      expect(!memcmp(first.data(), y.data(), y.size() * 4), "block", (*set)->name, bits, tokens, inner);
  }
}

void check_attention(Pool& pool, int heads, int queries, int keys, int width, bool causal) {
  auto q = floats(size_t(heads) * queries * width), k = floats(size_t(keys) * width), v = floats(size_t(keys) * width);
  Result first;
  for (auto* const* set = ALL; *set; set++) {
    if (!usable(**set)) continue;
    Result y = exact<float>(q.size());
    Attention a{};
    a.q = q.data(), a.k = k.data(), a.v = v.data(), a.out = y.data();
    a.q_head = a.out_head = ptrdiff_t(queries) * width, a.q_row = a.k_row = a.v_row = a.out_row = width;
    a.queries = queries, a.keys = keys, a.width = a.value_width = width, a.causal = causal, a.scale = .125f;
    attention({pool, **set}, 1, heads, a, [&](int) { return a; });
    for (int i = 0; i < heads * queries; i += 7) {
      const int limit = causal ? keys - queries + i % queries + 1 : keys;
      std::vector<double> p;
      double total = 0;
      for (int s = 0; s < limit; s++) {
        double dot = 0;
        for (int d = 0; d < width; d++) dot += double(q[size_t(i) * width + d]) * k[size_t(s) * width + d];
        p.push_back(exp(dot * .125));
        total += p.back();
      }
      for (int d = 0; d < width; d++) {
        double sum = 0;
        for (int s = 0; s < limit; s++) sum += p[size_t(s)] / total * v[size_t(s) * width + d];
        if (!(fabs(sum - y[size_t(i) * width + d]) < 1e-5)) {
          expect(false, "attention", (*set)->name, queries, keys, width);
          return;
        }
      }
    }
    if (first.empty())
      first = y;
    else
      expect(!memcmp(first.data(), y.data(), y.size() * 4), "attention bits", (*set)->name, queries, keys, width);
  }
}

// Experts of three parts from a file into exact-size banks: what lies in a slot is what was written, whatever was there
// before; damage, a short file and forged ids are errors that leave the shelf usable.
void check_shelf(Pool& pool, int slots) {
  constexpr int EXPERTS = 9;
  constexpr size_t RAW = 200, CODES_4 = 72, CODES_3 = 54, SCALES = 26;  // every third expert has 3 bits
  char name[] = "/tmp/squizd-check-XXXXXX";
  const int fd = mkstemp(name);
  unlink(name);
  std::vector<uint8_t> file = exact<uint8_t>(EXPERTS * RAW);
  for (auto& byte : file) byte = uint8_t(random_bits());
  if (pwrite(fd, file.data(), file.size(), 0) != ssize_t(file.size())) abort();
  auto codes = exact<uint8_t>(CODES_4 * size_t(slots)), wide = exact<uint8_t>(2 * SCALES * size_t(slots));
  const Part floats{128, SCALES, FROM_BF16, wide.data(), 2 * SCALES};
  const std::vector<std::vector<Part>> layouts{{{0, CODES_4, AS_STORED, codes.data(), CODES_4}, floats},
                                               {{3, CODES_3, CODES, codes.data(), CODES_4, 3, 4}, floats}};
  std::vector<Extent> records;
  for (size_t i = 0; i < EXPERTS; i++) {
    const size_t size = i % 3 ? RAW : RAW - 9;
    records.push_back({i * RAW, size, xxh64(&file[i * RAW], size), i % 3 ? size_t(0) : size_t(1)});
  }
  Shelf shelf("file", fd, 3, layouts, records, slots, {{4, 5, 6}, {3, 2, 1}, 5, 8}, 64);
  shelf.arrange({}, std::vector<uint64_t>(EXPERTS, 0), 0, {}, 0);

  auto right = [&](int expert, uint32_t slot) {
    if (slot >= uint32_t(slots)) return false;
    const uint8_t *row = &codes[slot * CODES_4], *stored = &file[size_t(expert) * RAW];
    bool good = expert % 3 == 0 || !memcmp(row, stored, CODES_4);
    auto bit = [](const uint8_t* stream, size_t i) { return stream[i / 8] >> i % 8 & 1; };
    for (size_t i = 0; i < 8 * CODES_4 && expert % 3 == 0; i++)
      good = good && bit(row, i) == (i % 4 == 3 ? 0 : bit(stored + 3, i / 4 * 3 + i % 4));
    for (size_t i = 0; i < SCALES; i++) {
      const uint8_t* to = &wide[slot * 2 * SCALES + i / 2 * 4];
      good = good && to[2 + i % 2] == file[size_t(expert) * RAW + 128 + i] && !to[0] && !to[1];
    }
    return good;
  };
  const uint32_t all[EXPERTS] = {0, 1, 2, 3, 4, 5, 6, 7, 8};
  for (int round = 0; round < 200; round++) {
    if (round == 100 && slots < EXPERTS) {  // more than there is room for: nothing of it may seem to lie there
      uint32_t where[EXPERTS];
      bool refused = false;
      try {
        shelf.place(all, slots + 1, where, pool);
      } catch (const std::length_error&) {
        refused = true;
      }
      bool good = refused;
      for (auto [expert, slot] : shelf.order()) good = good && right(expert, uint32_t(slot));
      expect(good, "too many", "-", slots + 1, 0, slots);
    }
    uint32_t ids[4], where[4];
    const int count = 1 + int(random_bits() % unsigned(slots < 4 ? slots : 4));
    for (int i = 0; i < count; i++) ids[i] = random_bits() % EXPERTS;
    shelf.place(ids, count, where, pool);
    for (int i = 0; i < count; i++) expect(right(int(ids[i]), where[i]), "shelf", "-", round, int(ids[i]), slots);
    const Recall& r = shelf.recall();
    if (round % 50 == 49) shelf.arrange(shelf.order(), r.counts(), r.token(), r.history(), r.choices());
    if (round % 10 == 9) posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  }
  auto throws = [&](uint32_t id) {
    uint32_t where;
    try {
      shelf.place(&id, 1, &where, pool);
    } catch (const std::exception&) {
      return true;
    }
    return false;
  };
  for (uint32_t id : {uint32_t(EXPERTS), 1u << 31, ~0u}) expect(throws(id), "forged id", "-", int(id), 0, slots);
  shelf.arrange({}, std::vector<uint64_t>(EXPERTS, 0), 0, {}, 0);
  const uint8_t changed = uint8_t(file[5 * RAW + 100] ^ 1);  // in the padding between parts
  if (pwrite(fd, &changed, 1, 5 * RAW + 100) != 1) abort();
  expect(throws(5) && last_failure().expert == 5 && last_failure().offset == 5 * RAW, "damage", "-", 5, 0, slots);
  if (pwrite(fd, &file[5 * RAW + 100], 1, 5 * RAW + 100) != 1) abort();
  expect(!throws(5) && right(5, uint32_t(shelf.order().back().second)), "repair", "-", 5, 0, slots);
  if (ftruncate(fd, RAW * 7 + 1)) abort();
  expect(throws(7) && throws(8) && !throws(6), "short file", "-", 0, 0, slots);
  close(fd);
}

// Codes of any two widths, in memory of exactly their size.
void check_codes() {
  for (int narrow = 1; narrow < 8; narrow++)
    for (int wide = narrow + 1; wide <= 8; wide++)
      for (size_t eights : {1, 2, 3, 4, 5, 9, 64, 1000}) {
        auto few = exact<uint8_t>(eights * size_t(narrow)), many = exact<uint8_t>(eights * size_t(wide));
        for (auto& byte : few) byte = uint8_t(random_bits());
        widen_codes(few.data(), few.size(), narrow, wide, many.data());
        bool good = true;
        for (size_t code = 0; code < 8 * eights; code++)
          for (size_t bit = 0; bit < size_t(wide); bit++) {
            const size_t to = code * size_t(wide) + bit, from = code * size_t(narrow) + bit;
            good = good && (many[to / 8] >> to % 8 & 1) == (bit < size_t(narrow) ? few[from / 8] >> from % 8 & 1 : 0);
          }
        expect(good, "codes", "-", narrow, wide, int(eights));
      }
}

}  // namespace

int main() {
  Pool pool(3);
  check_codes();
  for (int slots : {1, 2, 4, 9}) check_shelf(pool, slots);
  for (int bits : {2, 3, 4, 5, 6, 8})
    for (int group : {32, 64, 128})
      for (int count : {1, 2, 13})
        for (int outputs : {1, 7, 64}) check_layer(pool, AFFINE, bits, group, count, outputs, group * (1 + count % 3));
  for (int count : {1, 13}) check_layer(pool, MXFP4, 4, 32, count, 9, 160);
  for (int cols : {1, 15, 16, 33, 100}) check_layer(pool, FLOATS, 32, 0, 5, 10, cols);
  check_layer(pool, AFFINE, 4, 64, 3, 1030, 1024);
  for (int tokens : {1, 3, 40}) {
    check_block(pool, AFFINE, 4, 32, tokens, 2, 96, 64);
    check_block(pool, AFFINE, 3, 32, tokens, 4, 160, 96);
    check_block(pool, MXFP4, 4, 32, tokens, 1, 64, 32);
    check_block(pool, FLOATS, 32, 0, tokens, 2, 41, 64);
  }
  for (int keys : {1, 255, 256, 257, 600})
    for (bool causal : {false, true}) check_attention(pool, 3, keys < 40 ? keys : 40, keys, 48, causal);
  printf(failures ? "%d failures\n" : "kernels: all good\n", failures);
  return failures != 0;
}
