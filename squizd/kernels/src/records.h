// A record of the file, and how its bytes get into a slot: read, verified, widened. The counterpart of runtime/io.py.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <string>
#include <vector>

namespace squizd {

enum Widen { AS_STORED = 0, FROM_BF16 = 1, FROM_F16 = 2 };

// A part of a record and where it goes: `size` stored bytes at `offset` of the record, into row `slot` of `bank`.
struct Part {
  size_t offset, size;
  Widen widen;
  uint8_t* bank;
  size_t row_bytes;
};

struct Extent {
  uint64_t offset, size, digest;
};

// Records of one layout and one file. Threads share it; each has a buffer of its own for what cannot go straight into a slot.
class Records {
 public:
  using Buffer = std::vector<uint8_t>;

  // `parts` in the order of their offsets; `step`: bytes that can be announced in one call. Throws std::invalid_argument for
  // parts that overlap or do not fit.
  Records(int fd, std::vector<Part> parts, std::vector<Extent> records, size_t step);

  enum Outcome { DONE, FAILED, NOT_CACHED };

  // Fill row `slot` with record `index`. Without `wait` only from what the system has in memory: NOT_CACHED otherwise.
  // Hashes what has come while the system reads on. After FAILED (`error` says why) and NOT_CACHED the row is undefined.
  Outcome read(int index, int slot, bool wait, Buffer& buffer, std::string& error) const;

  // Have the system begin to read a record; returns at once.
  void announce(int index) const;

  // Whether the end of a record is in the system's memory; false also where the file system cannot tell.
  bool cached(int index) const;

  const Extent& operator[](int index) const { return records_[size_t(index)]; }
  int count() const { return int(records_.size()); }

 private:
  const int fd_;
  const size_t step_;
  const std::vector<Part> parts_;
  const std::vector<Extent> records_;
  size_t staged_ = 0;  // bytes of one record that pass through a buffer
};

uint64_t xxh64(const uint8_t* data, size_t size);

}  // namespace squizd
