// Routers and experts of a token, while the GPU runs through it without the host's say. In each paged layer a small kernel
// (runtime/exchange.py) writes the router's choice into this layer's box, in host memory that the GPU reaches, and waits there until a
// thread of ours has made those experts resident and written their slots beside it. So nobody waits but the GPU, and only for what is
// missing. What lies in which slot, and who is given up, is decided here meanwhile, as in runtime/pager.py.
#pragma once
#include <chrono>
#include <memory>

#include "recall.h"
#include "transfer.h"

namespace squizd {

constexpr int MOST_CHOICES = 30;

// Each half on cache lines of its own: the GPU writes the first, we write the second.
struct alignas(128) Box {
  volatile uint32_t sent;  // how many choices the GPU has sent
  volatile uint32_t experts[MOST_CHOICES];
  volatile uint32_t lost;  // it waited longer than `patience`, and went on with slot 0
  alignas(128) volatile uint32_t answered;
  volatile uint32_t slots[MOST_CHOICES];
  volatile uint32_t patience;  // milliseconds
};
static_assert(sizeof(Box) == 256);

class Exchange {
 public:
  struct Failure {
    int layer, expert, status;
  };
  struct Counts {
    uint64_t hits = 0, misses = 0, evictions = 0, bytes = 0, nanoseconds = 0;
  };
  struct Layer {
    Layer(const Shelf* of, int slots, int k, const Rules& rules)
        : shelf(of), choices(k), slot_of(of->records.size(), -1), expert_in(size_t(slots), -1), used(size_t(slots), 0),
          recall(int(of->records.size()), rules) {}
    const Shelf* shelf;
    int choices;
    std::vector<int> slot_of, expert_in;
    std::vector<uint64_t> used;  // by slot: the clock of its last use
    Recall recall;
    Counts counts;
  };

  Exchange(Transfer& transfer, std::vector<Layer> layers);  // `box` is null if there is no memory
  ~Exchange();
  Exchange(const Exchange&) = delete;

  Box* box(int layer) { return boxes_ ? boxes_ + layer : nullptr; }
  Layer& layer(int index) { return layers_[size_t(index)]; }  // only while nothing is served

  void begin(uint32_t patience);  // serve
  // Waits until `expected` choices have been served and all that was read is verified; then serves no more. What failed first, or
  // status 0.
  Failure finish(int expected);
  void stop();  // serve no more; the GPU must be idle

 private:
  void serve();
  void answer(int index);
  int place(int index, const uint32_t* ids, uint32_t* slots);

  Transfer& transfer_;
  std::vector<Layer> layers_;
  Box* boxes_ = nullptr;
  std::vector<uint32_t> seen_;
  uint64_t clock_ = 0;
  Failure failure_{};
  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  std::atomic<bool> serving_{false};
  std::atomic<int> served_{0};
  bool busy_ = false, end_ = false;
  std::thread thread_;
};

}  // namespace squizd
