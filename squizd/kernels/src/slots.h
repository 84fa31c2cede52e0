// Which expert of a layer lies in which slot, and who is given up: the counterpart of `Slots` in runtime/pager.py, for whoever
// fills slots without asking Python (shelf.h, exchange.h). `Recall` says who is given up; nothing is read here.
#pragma once
#include <utility>

#include "recall.h"

namespace squizd {

class Slots {
 public:
  struct Counts {
    uint64_t hits = 0, misses = 0, evictions = 0, bytes = 0, nanoseconds = 0;
  };

  Slots(int experts, int slots, Rules rules);

  int experts() const { return int(slot_of_.size()); }
  const std::vector<int>& expert_in() const { return expert_in_; }  // by slot; -1: empty
  int slot_of(int expert) const { return slot_of_[size_t(expert)]; }  // -1: none

  // The slots of the `count` expert ids of one token, all below `experts()`. Those that lie in none are given one each, which the
  // caller fills, or has emptied by `reject`: `missing` and `into` (with room for `count`); returns how many. Throws std::length_error, with
  // none given away, if there are fewer slots than different ids.
  int place(const uint32_t* ids, int count, uint32_t* slots, int* missing, int* into);
  void filled(uint64_t bytes) { counts.misses++, counts.bytes += bytes; }
  void reject(int expert);  // its slot, if it has one, is empty

  std::vector<std::pair<int, int>> order();  // (expert, slot), next victim first
  const Recall& recall() const { return recall_; }
  // What lies where, and the rest as in Recall::restore. Throws std::out_of_range and what that throws.
  void arrange(const std::vector<std::pair<int, int>>& order, const std::vector<uint64_t>& chosen, int token,
               const std::vector<uint32_t>& history, int choices);

  Counts counts;

 private:
  int take(uint64_t now);
  bool goes_before(int slot, int other, const std::vector<uint64_t>& scores) const;

  std::vector<int> slot_of_, expert_in_;
  std::vector<uint64_t> used_;  // by slot: the clock of its last use
  uint64_t clock_ = 0;
  Recall recall_;
};

}  // namespace squizd
