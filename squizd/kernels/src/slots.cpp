#include "slots.h"

#include <algorithm>
#include <stdexcept>

namespace squizd {

Slots::Slots(int experts, int slots, Rules rules)
    : slot_of_(size_t(experts), -1), expert_in_(size_t(slots), -1), used_(size_t(slots), 0), recall_(experts, std::move(rules)) {}

int Slots::place(const uint32_t* ids, int count, uint32_t* slots, int* missing, int* into) {
  const uint64_t now = ++clock_;
  for (int i = 0; i < count; i++) {
    const int slot = slot_of_[ids[i]];
    if (slot < 0) continue;
    counts.hits += used_[size_t(slot)] != now;
    used_[size_t(slot)] = now;
  }
  recall_.see(ids, count);
  int found = 0;
  for (int i = 0; i < count; i++) {
    const int expert = int(ids[i]);
    if (slot_of_[size_t(expert)] >= 0) continue;
    const int slot = take(now);
    if (slot < 0) {
      while (found) reject(missing[--found]);
      throw std::length_error("more experts are needed at once than there are slots");
    }
    int& before = expert_in_[size_t(slot)];
    if (before >= 0) slot_of_[size_t(before)] = -1, counts.evictions++;
    before = expert;
    slot_of_[size_t(expert)] = slot;
    used_[size_t(slot)] = now;
    missing[found] = expert, into[found++] = slot;
  }
  for (int i = 0; i < count; i++) slots[i] = uint32_t(slot_of_[ids[i]]);
  return found;
}

// A slot to overwrite, not used `now`: an empty one, or that of the expert that counts least; -1 if there is none.
int Slots::take(uint64_t now) {
  const auto empty = std::find(expert_in_.begin(), expert_in_.end(), -1);
  if (empty != expert_in_.end()) return int(empty - expert_in_.begin());
  const auto& scores = recall_.scores();
  int victim = -1;
  for (int s = 0; s < int(expert_in_.size()); s++)
    if (used_[size_t(s)] != now && (victim < 0 || goes_before(s, victim, scores))) victim = s;
  return victim;
}

bool Slots::goes_before(int slot, int other, const std::vector<uint64_t>& scores) const {
  const int a = expert_in_[size_t(slot)], b = expert_in_[size_t(other)];
  const uint64_t one = scores[size_t(a)], two = scores[size_t(b)];
  return one != two ? one < two : a < b;
}

void Slots::reject(int expert) {
  int& slot = slot_of_[size_t(expert)];
  if (slot < 0) return;
  expert_in_[size_t(slot)] = -1;
  used_[size_t(slot)] = 0;
  slot = -1;
}

std::vector<std::pair<int, int>> Slots::order() {
  std::vector<std::pair<int, int>> out;
  for (int s = 0; s < int(expert_in_.size()); s++)
    if (expert_in_[size_t(s)] >= 0) out.emplace_back(expert_in_[size_t(s)], s);
  const auto& scores = recall_.scores();
  std::sort(out.begin(), out.end(), [&](auto& a, auto& b) { return goes_before(a.second, b.second, scores); });
  return out;
}

void Slots::arrange(const std::vector<std::pair<int, int>>& order, const std::vector<uint64_t>& chosen, int token,
                    const std::vector<uint32_t>& history, int choices) {
  recall_.restore(chosen, token, history, choices);
  std::fill(slot_of_.begin(), slot_of_.end(), -1);
  std::fill(expert_in_.begin(), expert_in_.end(), -1);
  std::fill(used_.begin(), used_.end(), 0);
  for (auto [expert, slot] : order) {
    if (expert < 0 || expert >= experts() || slot < 0 || slot >= int(expert_in_.size())) throw std::out_of_range("no such expert or slot");
    slot_of_[size_t(expert)] = slot;
    expert_in_[size_t(slot)] = expert;
  }
}

}  // namespace squizd
