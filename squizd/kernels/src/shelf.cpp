#include "shelf.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "announcer.h"

namespace squizd {
namespace {

constexpr uint64_t AHEAD = 16 << 20;  // bytes that the system is reading beside those that are waited for
constexpr int READERS = 4;             // threads that wait for a disk: more than compute where those are few

std::mutex failure_lock;
std::deque<Failure> failures;  // the last few: several tokens under way may fail before one is reported

Announcer& announcer() {
  static Announcer& one = *new Announcer;
  return one;
}

}  // namespace

Failure last_failure() {
  std::lock_guard lock(failure_lock);
  return failures.empty() ? Failure{} : failures.back();
}

Failure failure_of(const std::string& message) {
  std::lock_guard lock(failure_lock);
  for (auto f = failures.rbegin(); f != failures.rend(); ++f)
    if (f->message == message) return *f;
  return {};
}

Shelf::Shelf(std::string name, int fd, int layer, std::vector<Part> parts, std::vector<Extent> records, int slots, Rules rules,
             size_t step)
    : name_(std::move(name)), layer_(layer), slots_(slots), records_(fd, std::move(parts), std::move(records), step),
      slot_of_(size_t(records_.count()), -1), expert_in_(size_t(slots), -1), used_(size_t(slots), 0),
      recall_(records_.count(), std::move(rules)) {}

Shelf::~Shelf() { announcer().forget(records_, true); }

void Shelf::place(const uint32_t* ids, int count, uint32_t* slots, Pool& pool, const std::function<void()>& meanwhile) {
  if (!lent_) throw std::runtime_error(name_ + ": a token was begun before its slots were given back, and computed afterwards");
  std::vector<Missing> missing;
  const uint64_t now = ++clock_;
  for (int i = 0; i < count; i++) {
    if (ids[i] >= uint32_t(experts()))
      throw std::out_of_range(name_ + ": the router chose expert " + std::to_string(int32_t(ids[i])) + "; there are " +
                              std::to_string(experts()));
    const int slot = slot_of_[ids[i]];
    if (slot < 0) continue;
    counts_.hits += used_[size_t(slot)] != now;
    used_[size_t(slot)] = now;
  }
  recall_.see(ids, count);
  if (foresight_.chosen(ids, count)) announcer().forget(records_, false);  // from here on it knows better
  for (int i = 0; i < count; i++) {
    const int expert = int(ids[i]);
    if (slot_of_[size_t(expert)] >= 0) continue;
    const int slot = take(now);
    slot_of_[size_t(expert)] = slot;
    expert_in_[size_t(slot)] = expert;
    used_[size_t(slot)] = now;
    missing.push_back({expert, slot, Records::NOT_CACHED, {}});
  }
  if (!missing.empty()) bring(missing, pool, meanwhile);
  else if (meanwhile) meanwhile();
  for (int i = 0; i < count; i++) slots[i] = uint32_t(slot_of_[ids[i]]);
}

void Shelf::expect(const uint32_t* ids, int count) {
  foresight_.guess(
      ids, count, [&](int expert) { return slot_of_[size_t(expert)] < 0; },
      [&](int expert) {
        if (foresight_.when() != Foresight::ALWAYS && records_.cached(expert)) return false;
        announcer().add(records_, expert);
        foresight_.from_disk();
        return true;
      });
}

// A slot to overwrite, not used `now`: an empty one, or that of the expert that counts least.
int Shelf::take(uint64_t now) {
  int victim = -1;
  for (int s = 0; s < slots_; s++)
    if (expert_in_[size_t(s)] < 0) return s;
  const auto& scores = recall_.scores();
  for (int s = 0; s < slots_; s++)
    if (used_[size_t(s)] != now && (victim < 0 || goes_before(scores, s, victim))) victim = s;
  if (victim < 0) throw std::runtime_error(name_ + ": more experts are needed at once than there are slots");
  slot_of_[size_t(expert_in_[size_t(victim)])] = -1;
  counts_.evictions++;
  return victim;
}

bool Shelf::goes_before(const std::vector<uint64_t>& scores, int slot, int other) const {
  const int a = expert_in_[size_t(slot)], b = expert_in_[size_t(other)];
  const uint64_t one = scores[size_t(a)], two = scores[size_t(b)];
  return one != two ? one < two : a < b;
}

void Shelf::bring(std::vector<Missing>& missing, Pool& pool, const std::function<void()>& meanwhile) {
  const auto began = std::chrono::steady_clock::now();
  // What needs no disk, by the threads that compute; if anything else is missing, it is waited for by others, which sleep.
  buffers_.resize(std::max(buffers_.size(), size_t(std::max(pool.workers(), READERS))));
  pool.run(int(missing.size()), false, [&](int task, int worker) { read(missing[size_t(task)], false, worker); });
  std::vector<Missing*> cold;
  for (Missing& m : missing)
    if (m.outcome == Records::NOT_CACHED) cold.push_back(&m);
  if (!cold.empty()) {
    foresight_.from_disk();
    wait_for(cold, meanwhile);
  }
  counts_.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  if (cold.empty() && meanwhile) meanwhile();
  const Missing* failed = nullptr;
  for (const Missing& m : missing) {
    if (m.outcome == Records::DONE) {
      counts_.misses++;
      counts_.bytes += records_[m.expert].size;
      continue;
    }
    slot_of_[size_t(m.expert)] = expert_in_[size_t(m.slot)] = -1;
    used_[size_t(m.slot)] = 0;
    if (!failed) failed = &m;
  }
  if (failed) report(*failed);
}

void Shelf::read(Missing& m, bool wait, int worker) {
  m.outcome = records_.read(m.expert, m.slot, wait, buffers_[size_t(worker)], m.error);
}

// The system is told ahead what comes: threads that wait for one record each do not keep a disk busy.
void Shelf::wait_for(const std::vector<Missing*>& cold, const std::function<void()>& meanwhile) {
  std::mutex announcing;
  std::atomic<size_t> next{0};
  size_t announced = 0;
  uint64_t ahead = 0;  // bytes announced, and not yet begun to be read
  auto announce = [&](size_t task) {
    while (announced < cold.size() && (announced <= task || ahead < AHEAD)) {
      records_.announce(cold[announced]->expert);
      ahead += records_[cold[announced++]->expert].size;
    }
  };
  auto work = [&](int worker) {
    for (size_t task; (task = next.fetch_add(1)) < cold.size();) {
      {
        std::lock_guard lock(announcing);
        announce(task);
        ahead -= records_[cold[task]->expert].size;
      }
      read(*cold[task], true, worker);
    }
  };
  announce(0);  // what is needed now comes before what `meanwhile` announces
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < std::min(READERS, int(cold.size())); i++) others.emplace_back(work, i);
  } catch (const std::system_error&) {  // as many as there can be
  }
  if (meanwhile) meanwhile();
  work(0);
  for (std::thread& other : others) other.join();
}

void Shelf::report(const Missing& missing) const {
  const uint64_t offset = records_[missing.expert].offset;
  Failure failure{"", name_, missing.error, layer_, missing.expert, offset};
  failure.message = name_ + ": layer " + std::to_string(layer_) + " expert " + std::to_string(missing.expert) + " at byte " +
                    std::to_string(offset) + ": " + missing.error;
  std::lock_guard lock(failure_lock);
  failures.push_back(failure);
  if (failures.size() > 16) failures.pop_front();
  throw std::runtime_error(failure.message);
}

std::vector<std::pair<int, int>> Shelf::order() {
  std::vector<std::pair<int, int>> out;
  for (int s = 0; s < slots_; s++)
    if (expert_in_[size_t(s)] >= 0) out.emplace_back(expert_in_[size_t(s)], s);
  const auto& scores = recall_.scores();
  std::sort(out.begin(), out.end(), [&](auto& a, auto& b) { return goes_before(scores, a.second, b.second); });
  return out;
}

void Shelf::arrange(const std::vector<std::pair<int, int>>& order, const std::vector<uint64_t>& counts, int token,
                    const std::vector<uint32_t>& history, int choices) {
  recall_.restore(counts, token, history, choices);
  lent_ = true;
  std::fill(slot_of_.begin(), slot_of_.end(), -1);
  std::fill(expert_in_.begin(), expert_in_.end(), -1);
  std::fill(used_.begin(), used_.end(), 0);
  for (auto [expert, slot] : order) {
    if (expert < 0 || expert >= experts() || slot < 0 || slot >= slots_) throw std::out_of_range("no such expert or slot");
    slot_of_[size_t(expert)] = slot;
    expert_in_[size_t(slot)] = expert;
    used_[size_t(slot)] = ++clock_;
  }
}

Shelf::Counts Shelf::take_counts() {
  Counts out = counts_;
  counts_ = {};
  lent_ = false;
  announcer().forget(records_, true);
  return out;
}

}  // namespace squizd
