#include "shelf.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>

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

Shelf::Shelf(std::string name, int fd, int layer, const std::vector<std::vector<Part>>& layouts, std::vector<Extent> records,
             int slots, Rules rules, size_t step)
    : name_(std::move(name)), layer_(layer), records_(fd, layouts, std::move(records), step),
      slots_(records_.count(), slots, std::move(rules)) {}

Shelf::~Shelf() { announcer().forget(records_, true); }

void Shelf::place(const uint32_t* ids, int count, uint32_t* slots, Pool& pool, const std::function<void()>& meanwhile) {
  if (!lent_) throw std::runtime_error(name_ + ": a token was begun before its slots were given back, and computed afterwards");
  for (int i = 0; i < count; i++)
    if (ids[i] >= uint32_t(experts()))
      throw std::out_of_range(name_ + ": the router chose expert " + std::to_string(int32_t(ids[i])) + "; there are " +
                              std::to_string(experts()));
  std::vector<int> absent(size_t(count), 0), into(size_t(count), 0);
  absent.resize(size_t(slots_.place(ids, count, slots, absent.data(), into.data())));
  if (foresight_.chosen(ids, count)) announcer().forget(records_, false);  // from here on it knows better
  std::vector<Missing> missing;
  for (size_t i = 0; i < absent.size(); i++) missing.push_back({absent[i], into[i], Records::NOT_CACHED, {}});
  if (!missing.empty()) bring(missing, pool, meanwhile);
  else if (meanwhile) meanwhile();
}

void Shelf::expect(const uint32_t* ids, int count) {
  foresight_.guess(
      ids, count, [&](int expert) { return slots_.slot_of(expert) < 0; },
      [&](int expert) {
        if (foresight_.when() != Foresight::ALWAYS && records_.cached(expert)) return false;
        announcer().add(records_, expert);
        foresight_.from_disk();
        return true;
      });
}

void Shelf::bring(std::vector<Missing>& missing, Pool& pool, const std::function<void()>& meanwhile) {
  const auto began = std::chrono::steady_clock::now();
  // What needs no disk, by the threads that compute; if anything else is missing, it is waited for by others, which sleep.
  pool.run(int(missing.size()), false, [&](int task, int) { read(missing[size_t(task)], false); });
  std::vector<Missing*> cold;
  for (Missing& m : missing)
    if (m.outcome == Records::NOT_CACHED) cold.push_back(&m);
  if (!cold.empty()) {
    foresight_.from_disk();
    wait_for(cold, meanwhile);
  }
  slots_.counts.nanoseconds += uint64_t(std::chrono::nanoseconds(std::chrono::steady_clock::now() - began).count());
  if (cold.empty() && meanwhile) meanwhile();
  const Missing* failed = nullptr;
  for (const Missing& m : missing) {
    if (m.outcome == Records::DONE) {
      slots_.filled(records_[m.expert].size);
      continue;
    }
    slots_.reject(m.expert);
    if (!failed) failed = &m;
  }
  if (failed) report(*failed);
}

void Shelf::read(Missing& m, bool wait) { m.outcome = records_.read(m.expert, m.slot, wait, m.error); }

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
  auto work = [&] {
    for (size_t task; (task = next.fetch_add(1)) < cold.size();) {
      {
        std::lock_guard lock(announcing);
        announce(task);
        ahead -= records_[cold[task]->expert].size;
      }
      read(*cold[task], true);
    }
  };
  announce(0);  // what is needed now comes before what `meanwhile` announces
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < std::min(READERS, int(cold.size())); i++) others.emplace_back(work);
  } catch (const std::system_error&) {  // as many as there can be
  }
  if (meanwhile) meanwhile();
  work();
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

void Shelf::arrange(const std::vector<std::pair<int, int>>& order, const std::vector<uint64_t>& counts, int token,
                    const std::vector<uint32_t>& history, int choices) {
  slots_.arrange(order, counts, token, history, choices);
  lent_ = true;
}

Slots::Counts Shelf::take_counts() {
  lent_ = false;
  announcer().forget(records_, true);
  return std::exchange(slots_.counts, {});
}

}  // namespace squizd
