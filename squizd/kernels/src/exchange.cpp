#include "exchange.h"

#include <stdexcept>

namespace squizd {

constexpr size_t PATIENT = 1 << 14;  // looks at all boxes before others may have the core

Exchange::Exchange(Transfer& transfer, std::vector<Layer> layers)
    : transfer_(transfer), layers_(std::move(layers)), seen_(layers_.size(), 0) {
  const size_t count = std::max<size_t>(layers_.size(), 1);
  void* memory = transfer_.shared(count * (sizeof(Box) + sizeof(*tables_)));
  if (!memory) return;
  boxes_ = static_cast<Box*>(memory);
  tables_ = reinterpret_cast<uint64_t(*)[MOST_PARTS][4]>(boxes_ + count);
  for (size_t i = 0; i < layers_.size(); i++) {
    Box& box = *new (boxes_ + i) Box{};
    box.patience = 1000;
    for (const Part& part : layers_[i].shelf->parts) {
      const uint64_t row[] = {part.offset, part.size, reinterpret_cast<uint64_t>(part.to), part.stride};
      for (uint64_t number : row)
        if ((transfer_.on_gpu() && number % UNIT) || box.parts == MOST_PARTS) throw std::invalid_argument("a part that is not made of whole units");
      std::copy(std::begin(row), std::end(row), tables_[i][box.parts++]);
    }
    box.table = tables_[i];
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
  patience_ = patience;
  for (size_t i = 0; i < layers_.size(); i++) {
    boxes_[i].lost = 0;
    boxes_[i].patience = patience;
    seen_[i] = boxes_[i].sent;
  }
  serving_ = busy_ = true;
  wake_.notify_all();
}

Exchange::Failure Exchange::finish(int expected) {
  const auto patience = std::chrono::milliseconds(patience_) + std::chrono::seconds(1);
  auto moved = std::chrono::steady_clock::now();
  for (int before = 0, now; (now = served_.load(std::memory_order_acquire)) < expected;) {
    if (now != before) before = now, moved = std::chrono::steady_clock::now();
    if (std::chrono::steady_clock::now() - moved > patience) {  // a GPU that failed asks no more
      stop();
      return failure_.status ? failure_ : Failure{0, 0, LOST};
    }
    std::unique_lock lock(mutex_);
    idle_.wait_for(lock, std::chrono::microseconds(200), [&] { return served_.load() >= expected; });
  }
  stop();
  for (const Rejected& bad : transfer_.settle())
    for (size_t i = 0; i < layers_.size(); i++) {
      Layer& layer = layers_[i];
      if (layer.shelf != bad.shelf) continue;
      layer.slots.reject(bad.expert);
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
        give_up();
        idle > PATIENT * layers_.size() ? std::this_thread::yield() : pause();
      }
      if (++next == layers_.size()) next = 0;
    }
    lock.lock();
    busy_ = false;
    idle_.notify_all();
  }
}

// Once the GPU has waited in vain it need not wait again: the token is lost.
void Exchange::give_up() {
  bool lost = false;
  for (size_t i = 0; i < layers_.size(); i++) lost |= boxes_[i].lost != 0;
  for (size_t i = 0; lost && i < layers_.size(); i++) boxes_[i].patience = 0;
}

void Exchange::answer(int index) {
  Layer& layer = layers_[size_t(index)];
  Box& box = boxes_[index];
  std::atomic_thread_fence(std::memory_order_acquire);
  const uint32_t number = box.sent;
  for (const uint8_t* data : lent_) transfer_.give(data);  // the GPU is past them, or it could not ask again
  lent_.clear();
  uint32_t ids[MOST_CHOICES], slots[MOST_CHOICES] = {};
  int missing[MOST_CHOICES], into[MOST_CHOICES], count = 0;
  for (int i = 0; i < layer.choices; i++) ids[i] = box.experts[i];
  for (int i = 0; i < layer.choices && !failure_.status; i++)
    if (ids[i] >= uint32_t(layer.slots.experts())) failure_ = {index, int(ids[i]), NO_EXPERT};
  if (!failure_.status) count = layer.slots.place(ids, layer.choices, slots, missing, into);  // after a failure nobody will see what is computed
  for (int i = 0; i < layer.choices; i++) box.slots[i] = slots[i];
  for (int i = 0; i < count; i++) box.coming[i].slot = uint32_t(into[i]);
  box.count = uint32_t(count);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  seen_[size_t(index)] = number;
  box.answered = number;
  if (count) deliver(index, number, count, missing, into);
}

// Read what is missing, and tell the GPU of each record as it is there.
void Exchange::deliver(int index, uint32_t number, int count, const int* missing, const int* into) {
  Layer& layer = layers_[size_t(index)];
  Box& box = boxes_[index];
  const auto began = std::chrono::steady_clock::now();
  transfer_.lend(layer.shelf, count, missing, [&](int i, const uint8_t* data, int status) {
    if (data) lent_.push_back(data);
    box.coming[i].source = reinterpret_cast<uint64_t>(data);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    box.coming[i].ready = number;
    if (!status) {
      layer.slots.filled(layer.shelf->records[size_t(missing[i])].size);
      return;
    }
    layer.slots.reject(missing[i]);
    if (!failure_.status) failure_ = {index, missing[i], status};
  });
  layer.slots.counts.nanoseconds += uint64_t(std::chrono::nanoseconds(std::chrono::steady_clock::now() - began).count());
}

}  // namespace squizd
