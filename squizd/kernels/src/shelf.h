// The experts of one layer that are in memory, for a token that is computed without asking Python: which lie in which
// slot, who is given up, and how one is read. The counterpart of runtime/pager.py, with the same rules: who is given up is decided
// as by Fading of runtime/policy.py, and every record's XXH64 is checked before its slot counts as filled.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <string>
#include <vector>

#include "pool.h"

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

class Shelf {
 public:
  // `name`: what an error message begins with. `parts` in the order of their offsets. `steps`: what a choice adds to an
  // expert's weight, by token within a half-life, after which all weights are halved: the lightest is given up first.
  Shelf(std::string name, int fd, int layer, std::vector<Part> parts, std::vector<Extent> records, int slots,
        std::vector<uint64_t> steps);

  // The slots of the `count` expert ids of one token; reads what is missing. Throws std::runtime_error, with the slots empty whose read
  // failed; `last_failure` tells more.
  void place(const uint32_t* ids, int count, uint32_t* slots, Pool& pool);

  // (expert, slot), next victim first; the weights of all experts, and the token within the half-life
  std::vector<std::pair<int, int>> order() const;
  const std::vector<uint64_t>& weights() const { return weights_; }
  int token() const { return token_; }
  void arrange(const std::vector<std::pair<int, int>>& order, const std::vector<uint64_t>& weights, int token);

  struct Counts {
    uint64_t hits = 0, misses = 0, evictions = 0, bytes = 0;
    double seconds = 0;
  };
  Counts take_counts();
  int experts() const { return int(records_.size()); }

 private:
  void weigh(const uint32_t* ids, int count);
  bool goes_before(int slot, int other) const;
  bool read(int expert, int slot, std::vector<uint8_t>& staging, std::string& error) const;

  std::string name_;
  int fd_, layer_, slots_;
  std::vector<Part> parts_;
  std::vector<Extent> records_;
  std::vector<int> slot_of_, expert_in_;
  std::vector<uint64_t> used_;  // by slot: the clock of its last use
  uint64_t clock_ = 0;
  const std::vector<uint64_t> steps_;
  std::vector<uint64_t> weights_;  // by expert, resident or not
  int token_ = 0;
  Counts counts_;
  size_t staged_ = 0;  // bytes of one record that pass through a buffer
  std::vector<std::vector<uint8_t>> staging_;  // by worker
};

// The read that failed last, of any shelf, and the message with which it was thrown.
struct Failure {
  std::string message, path, reason;
  int layer = 0, expert = 0;
  uint64_t offset = 0;
};
Failure last_failure();
Failure failure_of(const std::string& message);  // the one that was thrown so; empty if it was none of the last

uint64_t xxh64(const uint8_t* data, size_t size);

}  // namespace squizd
