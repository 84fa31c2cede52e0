// XXH64 over pieces, for what reads records.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

namespace squizd {

// XXH64, seed 0 (xxHash specification 0.1.1), over pieces.
class Hash {
 public:
  void add(const uint8_t* p, size_t size) {
    total_ += size;
    if (held_) {
      const size_t n = std::min(size, sizeof(block_) - held_);
      memcpy(block_ + held_, p, n);
      held_ += n, p += n, size -= n;
      if (held_ < sizeof(block_)) return;
      stripe(block_);
      held_ = 0;
    }
    for (; size >= 32; p += 32, size -= 32) stripe(p);
    memcpy(block_, p, size);
    held_ = size;
  }
  uint64_t digest() const {
    uint64_t h = P5;
    if (total_ >= 32) {
      h = turn(lane_[0], 1) + turn(lane_[1], 7) + turn(lane_[2], 12) + turn(lane_[3], 18);
      for (uint64_t lane : lane_) h = (h ^ turn(lane * P2, 31) * P1) * P1 + P4;
    }
    h += total_;
    const uint8_t *p = block_, *end = block_ + held_;
    for (; p + 8 <= end; p += 8) h = turn(h ^ turn(load<uint64_t>(p) * P2, 31) * P1, 27) * P1 + P4;
    for (; p + 4 <= end; p += 4) h = turn(h ^ load<uint32_t>(p) * P1, 23) * P2 + P3;
    for (; p < end; p++) h = turn(h ^ *p * P5, 11) * P1;
    h = (h ^ h >> 33) * P2;
    h = (h ^ h >> 29) * P3;
    return h ^ h >> 32;
  }

 private:
  static constexpr uint64_t P1 = 0x9E3779B185EBCA87, P2 = 0xC2B2AE3D27D4EB4F, P3 = 0x165667B19E3779F9, P4 = 0x85EBCA77C2B2AE63,
                            P5 = 0x27D4EB2F165667C5;
  static uint64_t turn(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }
  template <class T>
  static T load(const uint8_t* p) {  // little-endian machines only, as all that the kernels are built for
    T x;
    memcpy(&x, p, sizeof x);
    return x;
  }
  void stripe(const uint8_t* p) {
    for (int i = 0; i < 4; i++) lane_[i] = turn(lane_[i] + load<uint64_t>(p + 8 * i) * P2, 31) * P1;
  }
  uint64_t lane_[4] = {P1 + P2, P2, 0, 0 - P1}, total_ = 0;
  uint8_t block_[32];
  size_t held_ = 0;
};

}  // namespace squizd
