// What a layer will probably ask for, guessed by its own router from an earlier residual: which guesses are worth reading
// ahead. A guess is less often right the lower the router ranks it, and how often depends on the model; so it is counted
// by rank. Reads nothing itself.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <algorithm>
#include <vector>

namespace squizd {

class Foresight {
 public:
  enum When { NEVER, FROM_DISK, ALWAYS };  // FROM_DISK: while reads wait for a disk now and then

  void when(When when) { when_ = when; }
  When when() const { return when_; }
  bool wanted() const { return when_ == ALWAYS || (when_ == FROM_DISK && warm_ < PATIENCE); }

  // The guess for the next token: `ids`, likeliest first. `missing(id)`: whether it would have to be read. `announce(id)` has it
  // read, and returns false if there was no need to.
  template <class Missing, class Announce>
  void guess(const uint32_t* ids, int count, const Missing& missing, const Announce& announce) {
    guessed_.clear();
    if (trust_.size() < size_t(count)) trust_.resize(size_t(count));
    for (int i = 0; i < count; i++) {
      const bool absent = missing(int(ids[i]));
      guessed_.push_back({ids[i], absent, absent && trust_[size_t(i)].worth() && announce(int(ids[i]))});
    }
  }

  // The choice that was guessed at, before anything is read for it. Whether anything was announced.
  bool chosen(const uint32_t* ids, int count) {
    if (warm_ < PATIENCE) warm_++;
    bool announced = false;
    for (size_t i = 0; i < guessed_.size(); i++) {
      const Guess& guess = guessed_[i];
      const bool right = std::find(ids, ids + count, guess.expert) != ids + count;
      if (guess.absent) trust_[i].count(right);
      counts_.guessed++;
      counts_.right += right;
      announced |= guess.announced;
      counts_.announced += guess.announced;
      counts_.used += guess.announced && right;
    }
    guessed_.clear();
    return announced;
  }

  // A record was not in the system's cache.
  void from_disk() { warm_ = 0; }

  // Of experts: guessed, and those that were then chosen; announced, and those that were then read.
  struct Counts {
    uint64_t guessed = 0, right = 0, announced = 0, used = 0;
  };
  Counts take_counts() {
    const Counts out = counts_;
    counts_ = {};
    return out;
  }

 private:
  static constexpr int PATIENCE = 64;  // tokens without a read from disk
  struct Trust {  // in guesses of one rank that were not resident: the last 64 to 128
    int tried = 8, right = 8;
    void count(bool good) {
      tried++;
      right += good;
      if (tried >= 128) tried /= 2, right /= 2;
    }
    bool worth() const { return 2 * right >= tried; }
  };
  struct Guess {
    uint32_t expert;
    bool absent, announced;
  };
  When when_ = FROM_DISK;
  int warm_ = PATIENCE;  // tokens since a record came from a disk
  std::vector<Guess> guessed_;
  std::vector<Trust> trust_;  // by rank
  Counts counts_;
};

}  // namespace squizd
