#include "codes.h"

#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace squizd {
namespace {

// Eight codes, `narrow` bytes, are a word; they become the lower `wide` bytes of another.
struct Spread {
  uint64_t low[3];     // of each two halves the lower one: 4 codes, 2 of each 4, 1 of each 2
  int width[3], up[3];  // bits of a half; how far the upper one moves
  uint64_t fields;     // where the codes lie in the end

  Spread(int narrow, int wide) : low{}, fields(0) {
    for (int step = 0, half = 4; half; half /= 2, step++) {
      width[step] = half * narrow, up[step] = half * (wide - narrow);
      for (int code = 0; code < 8; code += 2 * half) low[step] |= ((uint64_t(1) << width[step]) - 1) << code * wide;
    }
    for (int code = 0; code < 8; code++) fields |= ((uint64_t(1) << narrow) - 1) << code * wide;
  }

  uint64_t operator()(uint64_t word) const {
    for (int step = 0; step < 3; step++) word = (word & low[step]) | (word & low[step] << width[step]) << up[step];
    return word;
  }
};

uint64_t load(const uint8_t* from, size_t size = 8) {
  uint64_t word = 0;
  memcpy(&word, from, size);
  return word;
}

void store(uint8_t* to, uint64_t word, size_t size = 8) { memcpy(to, &word, size); }

// Whole words are written, and what is too much written over by the next; so the last are left. Returns how many were done.
size_t most(size_t count, size_t narrow) {
  const size_t kept = 8 / narrow + 1;  // what 8 bytes of input, the fewer of the two, reach into
  return count > kept ? count - kept : 0;
}

#if defined(__x86_64__)
__attribute__((target("bmi2"))) size_t deposit(const uint8_t* from, size_t count, size_t narrow, size_t wide, uint64_t fields, uint8_t* to) {
  const size_t end = most(count, narrow);
  for (size_t i = 0; i < end; i++, from += narrow, to += wide) store(to, _pdep_u64(load(from), fields));
  return end;
}

// The first two generations of Zen deposit bit by bit.
bool deposits() {
  static const bool fast = __builtin_cpu_supports("bmi2") && !__builtin_cpu_is("znver1") && !__builtin_cpu_is("znver2");
  return fast;
}
#endif

size_t spread(const uint8_t* from, size_t count, size_t narrow, size_t wide, const Spread& how, uint8_t* to) {
  const size_t end = most(count, narrow);
  for (size_t i = 0; i < end; i++, from += narrow, to += wide) store(to, how(load(from)));
  return end;
}

}  // namespace

void widen_codes(const uint8_t* from, size_t size, int narrow, int wide, uint8_t* to) {
  const Spread how(narrow, wide);
  const size_t in = size_t(narrow), out = size_t(wide), count = size / in;
#if defined(__x86_64__)
  size_t done = deposits() ? deposit(from, count, in, out, how.fields, to) : spread(from, count, in, out, how, to);
#else
  size_t done = spread(from, count, in, out, how, to);
#endif
  for (; done < count; done++) store(to + done * out, how(load(from + done * in, in)), out);
}

}  // namespace squizd
