// The experts of one layer that are in memory, for a token that is computed without asking Python: which lie in which
// slot, and how those that are missing are read. The counterpart of runtime/pager.py, with the same rules: `Slots` says where
// they go, and every record's XXH64 is checked before its slot counts as filled.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <string>
#include <vector>

#include "foresight.h"
#include "pool.h"
#include "records.h"
#include "slots.h"

namespace squizd {

class Shelf {
 public:
  // `name`: what an error message begins with. `layouts`: as in Records.
  Shelf(std::string name, int fd, int layer, const std::vector<std::vector<Part>>& layouts, std::vector<Extent> records, int slots,
        Rules rules, size_t step);
  ~Shelf();

  // The slots of the `count` expert ids of one token; reads what is missing. Throws std::runtime_error, with the slots empty whose read
  // failed; `last_failure` tells more. `meanwhile` is called once: while a disk is waited for, if one is.
  void place(const uint32_t* ids, int count, uint32_t* slots, Pool& pool, const std::function<void()>& meanwhile = {});

  // `ids` may be asked for next, the first of them most probably: have the system begin to read what is missing and worth it.
  void expect(const uint32_t* ids, int count);
  Foresight& foresight() { return foresight_; }

  std::vector<std::pair<int, int>> order() { return slots_.order(); }
  const Recall& recall() const { return slots_.recall(); }
  void arrange(const std::vector<std::pair<int, int>>& order, const std::vector<uint64_t>& counts, int token,
               const std::vector<uint32_t>& history, int choices);  // as in Slots

  Slots::Counts take_counts();
  int experts() const { return records_.count(); }

 private:
  struct Missing {
    int expert, slot;
    Records::Outcome outcome = Records::NOT_CACHED;
    std::string error;
  };
  void bring(std::vector<Missing>& missing, Pool& pool, const std::function<void()>& meanwhile);
  void read(Missing& missing, bool wait);
  void wait_for(const std::vector<Missing*>& cold, const std::function<void()>& meanwhile);
  [[noreturn]] void report(const Missing& missing) const;

  std::string name_;
  int layer_;
  Records records_;
  Slots slots_;
  Foresight foresight_;
  bool lent_ = false;  // whether slots are decided here: from `arrange` to `take_counts`
};

// The read that failed last, of any shelf, and the message with which it was thrown.
struct Failure {
  std::string message, path, reason;
  int layer = 0, expert = 0;
  uint64_t offset = 0;
};
Failure last_failure();
Failure failure_of(const std::string& message);  // the one that was thrown so; empty if it was none of the last

}  // namespace squizd
