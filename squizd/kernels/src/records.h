// A record of the file, and how its bytes get into a slot: read, verified, widened. The counterpart of runtime/io.py.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <string>
#include <vector>

namespace squizd {

enum Widen { AS_STORED = 0, FROM_BF16 = 1, FROM_F16 = 2, CODES = 3 };

// A part of a record and where it goes: `size` stored bytes at `offset` of the record, into row `slot` of `bank`. CODES of `narrow` bits
// become codes of `wide` bits.
struct Part {
  size_t offset, size;
  Widen widen;
  uint8_t* bank;
  size_t row_bytes;
  int narrow = 0, wide = 0;
};

struct Extent {
  uint64_t offset, size, digest;
  size_t layout = 0;
};

// Records of one layer and one file. Threads share it.
class Records {
 public:
  // `layouts`: the parts of each, in the order of their offsets; `step`: bytes that can be announced in one call. Throws
  // std::invalid_argument for parts that overlap or do not fit.
  Records(int fd, const std::vector<std::vector<Part>>& layouts, std::vector<Extent> records, size_t step);
  Records(const Records&) = delete;

  enum Outcome { DONE, FAILED, NOT_CACHED };

  // Fill row `slot` with record `index`. Without `wait` only from what the system has in memory: NOT_CACHED otherwise.
  // Hashes and widens what has come while the system reads on. After FAILED (`error` says why) and NOT_CACHED the row is undefined.
  Outcome read(int index, int slot, bool wait, std::string& error) const;

  // Have the system begin to read a record; returns at once.
  void announce(int index) const;

  // Whether the end of a record is in the system's memory; false also where the file system cannot tell.
  bool cached(int index) const;

  const Extent& operator[](int index) const { return records_[size_t(index)]; }
  int count() const { return int(records_.size()); }

 private:
  // Bytes of one part that are read together: straight into the row, or, to be widened, into a buffer first. Without a part: padding.
  struct Piece {
    const Part* part;
    size_t start, size;
    bool staged() const { return !part || part->widen; }
  };
  struct Layout {
    std::vector<Part> parts;
    std::vector<std::vector<Piece>> reads;  // one call each
  };
  static Layout divide(std::vector<Part> parts, size_t size);

  const int fd_;
  const size_t step_;
  std::vector<Layout> layouts_;
  const std::vector<Extent> records_;
};

uint64_t xxh64(const uint8_t* data, size_t size);

}  // namespace squizd
