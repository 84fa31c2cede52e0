// Which expert of a layer is given up first: the counterpart of `Recall` in runtime/policy.py, step by step the same.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <vector>

namespace squizd {

// The constants of runtime/policy.py, which has them once.
struct Rules {
  std::vector<uint64_t> steps;      // what a choice counts, by token within a half-life, after which all counts are halved
  std::vector<uint64_t> following;  // what an expert chosen 1, 2, ... tokens after one that resembles the last token counts
  uint64_t weight;
  int memory;  // tokens
};

class Recall {
 public:
  // Throws std::invalid_argument for rules without a half-life.
  Recall(int experts, Rules rules);

  void see(const uint32_t* ids, int count);  // the choices of one token, all below `experts`
  const std::vector<uint64_t>& scores();     // of all experts now: the least is given up first

  const std::vector<uint64_t>& counts() const { return counts_; }
  int token() const { return token_; }  // within the half-life
  int choices() const { return choices_; }
  std::vector<uint32_t> history() const;  // choices of the last tokens, one token after another
  void restore(const std::vector<uint64_t>& counts, int token, const std::vector<uint32_t>& history, int choices);

 private:
  const uint32_t* at(int token) const { return history_.data() + size_t(token) * size_t(choices_); }
  void remember(const uint32_t* ids);
  void vote();

  const Rules rules_;
  std::vector<uint64_t> counts_, scores_, votes_, share_;
  std::vector<uint32_t> history_;  // `tokens_` of up to 2 * memory tokens, of which the last `memory` count
  std::vector<uint32_t> common_;
  int token_ = 0, choices_ = 0, tokens_ = 0;
  uint64_t resemblance_ = 0;
  bool fresh_ = false;
};

}  // namespace squizd
