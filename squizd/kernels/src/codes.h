// Codes of few bits as codes of more bits: the same numbers, packed as MLX packs them (one stream of bits, least significant first).
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace squizd {

// Whether there is such a widening: from 1 to 7 bits to more, 8 at most.
constexpr bool widens(int narrow, int wide) { return 0 < narrow && narrow < wide && wide <= 8; }

// `size` bytes of codes of `narrow` bits, a multiple of `narrow`, become `size / narrow * wide` bytes at `to`. Touches no others.
void widen_codes(const uint8_t* from, size_t size, int narrow, int wide, uint8_t* to);

}  // namespace squizd
