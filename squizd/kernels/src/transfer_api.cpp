// The C interface of `transfer.h` and `exchange.h`, without Python or MLX: runtime/transfer.py and runtime/exchange.py call it through ctypes.
#include <memory>
#include <stdexcept>

#include "codes.h"
#include "exchange.h"

using namespace squizd;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* squizd_sources() { return SQUIZD_SOURCES; }

// See codes.h.
EXPORT void squizd_widen_codes(const uint8_t* from, uint64_t size, int narrow, int wide, uint8_t* to) {
  widen_codes(from, size_t(size), narrow, wide, to);
}

// Null if there is no memory or no such library.
EXPORT void* squizd_transfer_open(int threads, int spins, int buffers, uint64_t buffer_bytes, const char* library) {
  auto transfer = std::make_unique<Transfer>(threads, spins, buffers, size_t(buffer_bytes), library);
  return transfer->good() ? transfer.release() : nullptr;
}

EXPORT void squizd_transfer_close(void* transfer) { delete static_cast<Transfer*>(transfer); }

// parts: [count][offset in a record as slots hold it, size there, address of slot 0, bytes from slot to slot]; layouts:
// [count][parts][offset, size, bits of codes as stored and in slots: 1 and 1 if they are copied]; records: [count][offset, size, digest, layout]
EXPORT void* squizd_shelf_open(int fd, int parts, const uint64_t* part, int layouts, const uint64_t* stored, int records, const uint64_t* record) {
  auto shelf = std::make_unique<Shelf>();
  shelf->fd = fd;
  for (int i = 0; i < parts; i++, part += 4)
    shelf->parts.push_back({size_t(part[0]), size_t(part[1]), reinterpret_cast<uint8_t*>(part[2]), size_t(part[3])});
  for (int i = 0; i < layouts; i++) {
    auto& layout = shelf->layouts.emplace_back();
    for (int j = 0; j < parts; j++, stored += 4) layout.push_back({size_t(stored[0]), size_t(stored[1]), int(stored[2]), int(stored[3])});
  }
  for (int i = 0; i < records; i++, record += 4) shelf->records.push_back({record[0], record[1], record[2], size_t(record[3])});
  return shelf.release();
}

EXPORT void squizd_shelf_close(void* shelf) { delete static_cast<Shelf*>(shelf); }

EXPORT void squizd_fetch(void* transfer, const void* shelf, int count, const int* experts, const int* slots, int* status) {
  static_cast<Transfer*>(transfer)->fetch(static_cast<const Shelf*>(shelf), count, experts, slots, status);
}

EXPORT int squizd_settle(void* transfer, int capacity, const void** shelves, int* experts) {
  const auto rejected = static_cast<Transfer*>(transfer)->settle();
  for (int i = 0; i < int(rejected.size()) && i < capacity; i++)
    shelves[i] = rejected[size_t(i)].shelf, experts[i] = rejected[size_t(i)].expert;
  return int(rejected.size());
}

// layers: [count][slots, choices]; null if something is out of range or there is no memory
EXPORT void* squizd_exchange_open(void* transfer, int count, const void* const* shelves, const int* layers, int steps, const uint64_t* step,
                                  int following, const uint64_t* follow, uint64_t weight, int memory) {
  try {
    const Rules rules{{step, step + steps}, {follow, follow + following}, weight, memory};
    std::vector<Exchange::Layer> all;
    for (int i = 0; i < count; i++) {
      const int slots = layers[2 * i], choices = layers[2 * i + 1];
      if (choices < 1 || choices > MOST_CHOICES || slots < choices) return nullptr;
      all.emplace_back(static_cast<const Shelf*>(shelves[i]), slots, choices, rules);
    }
    auto exchange = std::make_unique<Exchange>(*static_cast<Transfer*>(transfer), std::move(all));
    return exchange->box(0) ? exchange.release() : nullptr;
  } catch (const std::exception&) {
    return nullptr;
  }
}

EXPORT void squizd_exchange_close(void* exchange) { delete static_cast<Exchange*>(exchange); }

EXPORT uint64_t squizd_exchange_box(void* exchange, int layer) {
  return reinterpret_cast<uint64_t>(static_cast<Exchange*>(exchange)->box(layer));
}

EXPORT void squizd_exchange_begin(void* exchange, uint32_t patience) { static_cast<Exchange*>(exchange)->begin(patience); }

EXPORT void squizd_exchange_finish(void* exchange, int expected, int* failure) {
  const auto found = static_cast<Exchange*>(exchange)->finish(expected);
  failure[0] = found.layer, failure[1] = found.expert, failure[2] = found.status;
}

EXPORT void squizd_exchange_stop(void* exchange) { static_cast<Exchange*>(exchange)->stop(); }

// What lies where and what the policy knows: `history` of `tokens` x `choices`. Returns 0, or 1 if something is out of range.
EXPORT int squizd_exchange_arrange(void* exchange, int index, int count, const int* experts, const int* slots, const uint64_t* counts,
                                   int token, const uint32_t* history, int tokens, int choices) {
  auto& layer = static_cast<Exchange*>(exchange)->layer(index);
  std::vector<std::pair<int, int>> order;
  for (int i = 0; i < count; i++) order.emplace_back(experts[i], slots[i]);
  try {
    layer.slots.arrange(order, {counts, counts + layer.slots.experts()}, token, {history, history + size_t(tokens) * size_t(choices)}, choices);
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

// `expert_in` [slots] (-1: empty), `counts` [experts], `history` [room for memory x choices], `numbers`: token, choices, tokens of the
// history, hits, misses, evictions, bytes, nanoseconds (those counters begin anew).
EXPORT void squizd_exchange_state(void* exchange, int index, int* expert_in, uint64_t* counts, uint32_t* history, uint64_t* numbers) {
  auto& layer = static_cast<Exchange*>(exchange)->layer(index);
  const Recall& recall = layer.slots.recall();
  std::copy(layer.slots.expert_in().begin(), layer.slots.expert_in().end(), expert_in);
  std::copy(recall.counts().begin(), recall.counts().end(), counts);
  const auto remembered = recall.history();
  std::copy(remembered.begin(), remembered.end(), history);
  const int choices = recall.choices();
  const auto& c = layer.slots.counts;
  const uint64_t out[] = {uint64_t(recall.token()), uint64_t(choices), choices ? remembered.size() / size_t(choices) : 0,
                          c.hits, c.misses, c.evictions, c.bytes, c.nanoseconds};
  std::copy(std::begin(out), std::end(out), numbers);
  layer.slots.counts = {};
}
