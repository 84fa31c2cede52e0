// Routers and experts of a token, while the GPU runs through it without the host's say. In each paged layer a small kernel
// (runtime/asking.py) writes the router's choice into this layer's box, in host memory that the GPU reaches, and waits there until a
// thread of ours has written the slots of those experts beside it; then it copies those that are missing into their slots as
// they are read. So nobody waits but the GPU, and only for what is missing; and nothing here calls CUDA, whose locks may be
// held by one who waits for the GPU. What lies in which slot, and who is given up, is decided here meanwhile, as in runtime/pager.py.
#pragma once
#include <chrono>
#include <memory>

#include "slots.h"
#include "transfer.h"

namespace squizd {

constexpr int MOST_CHOICES = 30;

constexpr int MOST_PARTS = 16;
constexpr size_t UNIT = 16;  // what a GPU thread copies at once: all offsets, sizes and addresses are multiples

// A record on its way: where it lies, and the slot it belongs to. `ready` is the number of the choice once it lies there.
struct Coming {
  volatile uint64_t source;  // 0: it could not be read
  volatile uint32_t slot, ready;
};

// The GPU writes the first 128 bytes, we write the rest.
struct alignas(128) Box {
  volatile uint32_t sent;  // how many choices the GPU has sent
  volatile uint32_t experts[MOST_CHOICES];
  volatile uint32_t lost;  // it waited longer than `patience`, and went on with slot 0
  alignas(128) volatile uint32_t answered;
  volatile uint32_t slots[MOST_CHOICES];
  volatile uint32_t patience;  // milliseconds
  alignas(128) volatile uint32_t count;  // of `coming`
  uint32_t parts;
  const uint64_t (*table)[4];  // of each part: its offset in a record, size, address in slot 0, bytes from slot to slot
  Coming coming[MOST_CHOICES];
};
static_assert(sizeof(Box) == 768 && offsetof(Box, answered) == 128 && offsetof(Box, count) == 256 && offsetof(Box, coming) == 272);

class Exchange {
 public:
  struct Failure {
    int layer, expert, status;
  };
  struct Layer {
    Layer(const Shelf* of, int count, int k, const Rules& rules) : shelf(of), choices(k), slots(int(of->records.size()), count, rules) {}
    const Shelf* shelf;
    int choices;
    Slots slots;
  };

  Exchange(Transfer& transfer, std::vector<Layer> layers);  // `box` is null if there is no memory
  ~Exchange();
  Exchange(const Exchange&) = delete;

  Box* box(int layer) { return boxes_ ? boxes_ + layer : nullptr; }
  Layer& layer(int index) { return layers_[size_t(index)]; }  // only while nothing is served

  void begin(uint32_t patience);  // serve
  // Waits until `expected` choices have been served and all that was read is verified; then serves no more. What failed first, or
  // status 0. LOST if nothing was asked for longer than `patience` and a second.
  Failure finish(int expected);
  void stop();  // serve no more; the GPU must be idle

 private:
  void serve();
  void answer(int index);
  void deliver(int index, uint32_t number, int count, const int* missing, const int* into);
  void give_up();

  Transfer& transfer_;
  std::vector<Layer> layers_;
  Box* boxes_ = nullptr;
  uint64_t (*tables_)[MOST_PARTS][4] = nullptr;
  std::vector<uint32_t> seen_;
  std::vector<const uint8_t*> lent_;  // what the GPU fetches, or has fetched
  uint32_t patience_ = 0;
  Failure failure_{};
  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  std::atomic<bool> serving_{false};
  std::atomic<int> served_{0};
  bool busy_ = false, end_ = false;
  std::thread thread_;
};

}  // namespace squizd
