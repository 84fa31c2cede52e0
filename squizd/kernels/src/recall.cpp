#include "recall.h"

#include <algorithm>
#include <stdexcept>

namespace squizd {
namespace {

constexpr uint64_t CHANCE = 6;  // so much resemblance is none: two experts in common
constexpr uint64_t MOST = 64;   // keeps sums within 64 bits; reached where a token has over eleven experts

}  // namespace

Recall::Recall(int experts, Rules rules)
    : rules_(std::move(rules)), counts_(size_t(experts), 0), scores_(size_t(experts), 0), votes_(size_t(experts), 0),
      common_(size_t(experts), 0) {
  if (rules_.steps.empty() || rules_.memory < 1) throw std::invalid_argument("a half-life, or a memory, of no tokens");
  share_.resize(size_t(rules_.memory));
}

void Recall::see(const uint32_t* ids, int count) {
  if (count != choices_) {
    choices_ = count;
    tokens_ = 0;
    history_.assign(2 * size_t(rules_.memory) * size_t(count), 0);
  }
  for (int i = 0; i < count; i++) counts_[ids[i]] += rules_.steps[size_t(token_)];
  if (++token_ == int(rules_.steps.size())) {
    token_ = 0;
    for (uint64_t& c : counts_) c >>= 1;
  }
  remember(ids);
}

void Recall::remember(const uint32_t* ids) {
  if (tokens_ == 2 * rules_.memory) {
    std::copy_n(at(tokens_ - rules_.memory), size_t(rules_.memory) * size_t(choices_), history_.data());
    tokens_ = rules_.memory;
  }
  std::copy_n(ids, choices_, history_.data() + size_t(tokens_) * size_t(choices_));
  tokens_++;
  fresh_ = false;
}

// How alike each remembered token is to the last one, and what followed those that are.
void Recall::vote() {
  const int count = std::min(tokens_, rules_.memory), last = count - 1, k = choices_, reach = int(rules_.following.size());
  std::fill(votes_.begin(), votes_.end(), 0);
  resemblance_ = 0;
  if (last < 1) return;
  const uint32_t* ids = at(tokens_ - count);
  // Ten bits for each: three times the experts in common with the last token, twice those with the one before, and those
  // with the one before that.
  uint32_t* const common = common_.data();
  for (int j = 0; j < k; j++) common[ids[last * k + j]] += 3, common[ids[(last - 1) * k + j]] += 2 << 10;
  for (int j = 0; j < k && last > 1; j++) common[ids[(last - 2) * k + j]] += 1 << 20;
  uint64_t* const share = share_.data();  // by token: what an expert chosen there gains
  std::fill_n(share, count, 0);
  uint32_t before = 0, earlier = 0;
  for (int s = 0; s < last; s++) {
    uint32_t sum = 0;
    for (int j = 0; j < k; j++) sum += common[ids[s * k + j]];
    const uint64_t alike = (sum & 1023) + (before >> 10 & 1023) + (earlier >> 20);
    earlier = before;
    before = sum;
    if (alike <= CHANCE) continue;
    const uint64_t over = std::min(alike - CHANCE, MOST), weight = over * over * over * over;
    resemblance_ += weight;
    for (int d = 1; d <= reach && s + d <= last; d++) share[s + d] += weight * rules_.following[size_t(d - 1)];
  }
  for (int t = last; t >= 0 && t > last - 3; t--)
    for (int j = 0; j < k; j++) common[ids[t * k + j]] = 0;
  uint64_t* const votes = votes_.data();
  for (int s = 1; s < count; s++)
    if (const uint64_t gain = share[s])
      for (int j = 0; j < k; j++) votes[ids[s * k + j]] += gain;
}

const std::vector<uint64_t>& Recall::scores() {
  if (fresh_) return scores_;
  fresh_ = true;
  scores_ = counts_;
  if (!choices_) return scores_;
  vote();
  if (!resemblance_) return scores_;
  const uint64_t unit = (rules_.steps[size_t((token_ ? token_ : int(rules_.steps.size())) - 1)] >> 16) * rules_.weight;
  for (size_t e = 0; e < scores_.size(); e++) scores_[e] += (votes_[e] << 16) / resemblance_ * unit >> 8;
  return scores_;
}

std::vector<uint32_t> Recall::history() const {
  const int first = std::max(0, tokens_ - rules_.memory);
  return choices_ ? std::vector<uint32_t>(at(first), at(tokens_)) : std::vector<uint32_t>();
}

void Recall::restore(const std::vector<uint64_t>& counts, int token, const std::vector<uint32_t>& history, int choices) {
  if (counts.size() != counts_.size() || token < 0 || token >= int(rules_.steps.size()))
    throw std::invalid_argument("one count for each expert, and a token of the half-life");
  if (choices < 0 || (choices ? history.size() % size_t(choices) || history.size() > size_t(rules_.memory) * size_t(choices) : !history.empty()))
    throw std::invalid_argument("the choices of at most as many tokens as are remembered");
  for (uint32_t id : history)
    if (id >= counts_.size()) throw std::out_of_range("no such expert");
  counts_ = counts;
  token_ = token;
  choices_ = choices;
  tokens_ = choices ? int(history.size() / size_t(choices)) : 0;
  history_.assign(2 * size_t(rules_.memory) * size_t(choices), 0);
  std::copy(history.begin(), history.end(), history_.begin());
  fresh_ = false;
}

}  // namespace squizd
