#include "exchange.h"

namespace squizd {

Exchange::Exchange(Transfer& transfer, std::vector<Layer> layers)
    : transfer_(transfer), layers_(std::move(layers)), seen_(layers_.size(), 0) {
  boxes_ = static_cast<Box*>(transfer_.shared(sizeof(Box) * std::max<size_t>(layers_.size(), 1)));
  if (!boxes_) return;
  for (size_t i = 0; i < layers_.size(); i++) {
    boxes_[i].sent = boxes_[i].answered = boxes_[i].lost = 0;
    boxes_[i].patience = 1000;
  }
  thread_ = std::thread([this] { serve(); });
}

Exchange::~Exchange() {
  {
    std::lock_guard lock(mutex_);
    end_ = true;
    serving_ = false;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
  if (boxes_) transfer_.release(boxes_);
}

void Exchange::begin(uint32_t patience) {
  std::unique_lock lock(mutex_);
  idle_.wait(lock, [&] { return !busy_; });
  failure_ = {};
  served_ = 0;
  for (size_t i = 0; i < layers_.size(); i++) {
    boxes_[i].lost = 0;
    boxes_[i].patience = patience;
    seen_[i] = boxes_[i].sent;
  }
  serving_ = busy_ = true;
  wake_.notify_all();
}

Exchange::Failure Exchange::finish(int expected) {
  while (served_.load(std::memory_order_acquire) < expected) {
    std::unique_lock lock(mutex_);
    idle_.wait_for(lock, std::chrono::microseconds(200), [&] { return served_.load() >= expected; });
  }
  stop();
  for (const Rejected& bad : transfer_.settle())
    for (size_t i = 0; i < layers_.size(); i++) {
      Layer& layer = layers_[i];
      if (layer.shelf != bad.shelf) continue;
      int& slot = layer.slot_of[size_t(bad.expert)];
      if (slot >= 0) layer.expert_in[size_t(slot)] = -1, layer.used[size_t(slot)] = 0, slot = -1;
      if (!failure_.status) failure_ = {int(i), bad.expert, WRONG_DIGEST};
    }
  for (size_t i = 0; i < layers_.size(); i++)
    if (boxes_[i].lost && !failure_.status) failure_ = {int(i), 0, LOST};
  return failure_;
}

void Exchange::stop() {
  std::unique_lock lock(mutex_);
  serving_ = false;
  idle_.wait(lock, [&] { return !busy_; });
}

void Exchange::serve() {
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [&] { return end_ || serving_.load(); });
    if (end_) return;
    lock.unlock();
    for (size_t next = 0, idle = 0; serving_.load(std::memory_order_relaxed);) {
      if (boxes_[next].sent != seen_[next]) {
        answer(int(next));
        served_.fetch_add(1, std::memory_order_release);
        idle = 0;
      } else if (++idle % (64 * layers_.size()) == 0) {
        pause();
      }
      if (++next == layers_.size()) next = 0;
    }
    lock.lock();
    busy_ = false;
    idle_.notify_all();
  }
}

void Exchange::answer(int index) {
  Layer& layer = layers_[size_t(index)];
  Box& box = boxes_[index];
  std::atomic_thread_fence(std::memory_order_acquire);
  const uint32_t number = box.sent;
  uint32_t ids[MOST_CHOICES], slots[MOST_CHOICES] = {};
  for (int i = 0; i < layer.choices; i++) ids[i] = box.experts[i];
  if (!failure_.status) {  // after a failure nobody will see what is computed
    int expert = 0;
    for (int i = 0; i < layer.choices && !failure_.status; i++)
      if (ids[i] >= layer.slot_of.size()) failure_ = {index, int(ids[i]), NO_EXPERT};
    if (!failure_.status)
      if (const int status = place(index, ids, slots); status) failure_ = {index, expert = int(slots[0]), status}, slots[0] = 0;
  }
  for (int i = 0; i < layer.choices; i++) box.slots[i] = slots[i];
  std::atomic_thread_fence(std::memory_order_seq_cst);
  seen_[size_t(index)] = number;
  box.answered = number;
}

// The slots of one token's experts, reading what is missing; or a status, with the expert in slots[0].
int Exchange::place(int index, const uint32_t* ids, uint32_t* slots) {
  Layer& layer = layers_[size_t(index)];
  const int k = layer.choices;
  const uint64_t now = ++clock_;
  for (int i = 0; i < k; i++) {
    const int slot = layer.slot_of[ids[i]];
    if (slot < 0) continue;
    layer.counts.hits += layer.used[size_t(slot)] != now;
    layer.used[size_t(slot)] = now;
  }
  layer.recall.see(ids, k);
  int missing[MOST_CHOICES], into[MOST_CHOICES], status[MOST_CHOICES], count = 0;
  for (int i = 0; i < k; i++) {
    const int expert = int(ids[i]);
    if (layer.slot_of[size_t(expert)] >= 0) continue;
    const std::vector<uint64_t>& scores = layer.recall.scores();
    auto goes_before = [&](int a, int b) {  // empty slots, then by score, then by number
      const int x = layer.expert_in[size_t(a)], y = layer.expert_in[size_t(b)];
      if (x < 0 || y < 0) return x < 0 && y >= 0;
      return scores[size_t(x)] != scores[size_t(y)] ? scores[size_t(x)] < scores[size_t(y)] : x < y;
    };
    int victim = -1;
    for (int s = 0; s < int(layer.expert_in.size()); s++)
      if (layer.used[size_t(s)] != now && (victim < 0 || goes_before(s, victim))) victim = s;
    int& before = layer.expert_in[size_t(victim)];
    if (before >= 0) layer.slot_of[size_t(before)] = -1, layer.counts.evictions++;
    before = expert;
    layer.slot_of[size_t(expert)] = victim;
    layer.used[size_t(victim)] = now;
    missing[count] = expert, into[count] = victim, count++;
  }
  if (count) {
    const auto began = std::chrono::steady_clock::now();
    transfer_.fetch(layer.shelf, count, missing, into, status);
    layer.counts.nanoseconds += uint64_t(std::chrono::nanoseconds(std::chrono::steady_clock::now() - began).count());
    int failed = 0, first = 0;
    for (int i = count; i-- > 0;) {
      if (!status[i]) {
        layer.counts.misses++;
        layer.counts.bytes += layer.shelf->records[size_t(missing[i])].size;
        continue;
      }
      layer.slot_of[size_t(missing[i])] = layer.expert_in[size_t(into[i])] = -1;
      layer.used[size_t(into[i])] = 0;
      failed = status[i], first = missing[i];
    }
    if (failed) return slots[0] = uint32_t(first), failed;
  }
  for (int i = 0; i < k; i++) slots[i] = uint32_t(layer.slot_of[ids[i]]);
  return 0;
}

}  // namespace squizd
