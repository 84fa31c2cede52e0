// Records from a file to a GPU's memory: many threads read chunks into pinned memory, one copies them from there to the
// GPU as they arrive, and each record's XXH64 is computed after that, beside whatever the GPU does next.
// Codes of fewer bits than slots have for them are widened by the threads that read them, in pinned memory.
// Without a CUDA library the copies are plain ones, for tests and for memory that both sides share.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "pause.h"

namespace squizd {

// What became of a record; above 0 an errno.
enum Status { ARRIVED = 0, CUT_SHORT = -1, CUDA_FAILED = -2, WRONG_DIGEST = -3, NO_EXPERT = -4, LOST = -5 };

// What is used of the CUDA runtime API, found in the library that MLX has loaded.
struct Cuda {
  int (*alloc)(void**, size_t, unsigned) = nullptr;
  int (*free)(void*) = nullptr;
  int (*create)(void**, unsigned) = nullptr;
  int (*copy)(void*, const void*, size_t, int, void*) = nullptr;
  int (*wait)(void*) = nullptr;
  int (*destroy)(void*) = nullptr;

  bool load(const char* name);
};

// A part of a record as slots hold it: `size` bytes at `offset` of it go to `to` in slot 0.
struct Part {
  size_t offset, size;
  uint8_t* to;
  size_t stride;  // bytes from slot to slot
};

// The same part as it is stored: codes of `narrow` bits become codes of `wide` bits, or the two are the same: bytes are copied.
struct Stored {
  size_t offset, size;
  int narrow, wide;
  size_t widened(size_t bytes) const { return bytes / size_t(narrow) * size_t(wide); }
};

struct Record {
  uint64_t offset, size, digest;
  size_t layout;
};

// How one layer's records lie in the file, and where their parts go.
struct Shelf {
  int fd;
  std::vector<Part> parts;
  std::vector<std::vector<Stored>> layouts;  // of each, its parts in the order of `parts`
  std::vector<Record> records;
  bool as_stored(const Record& record) const;  // whether slots hold it as the file does
  size_t cut(const Record& record, size_t at) const;  // the last place up to `at` where it can be read and widened in two pieces
};

struct Rejected {
  const Shelf* shelf;
  int expert;
};

class Transfer {
 public:
  // `spins`: how often a thread looks for work before it sleeps. `library`: the CUDA runtime, or "" for plain memory.
  Transfer(int threads, int spins, int buffers, size_t buffer_bytes, const char* library);
  ~Transfer();
  Transfer(const Transfer&) = delete;
  bool good() const { return good_; }
  bool on_gpu() const { return on_gpu_; }

  // Reads experts into slots; `status` says what became of each. Returns when all bytes are there or have failed; digests
  // may still be computed. Calls must not overlap.
  void fetch(const Shelf* shelf, int count, const int* experts, const int* slots, int* status);

  // Reads experts into pinned memory, for a GPU that fetches them itself: `ready(i, data, status)` is called for each in turn as
  // its bytes are there (data is null if they are not). Who got data gives it back to `give`.
  using Ready = std::function<void(int, const uint8_t*, int)>;
  void lend(const Shelf* shelf, int count, const int* experts, const Ready& ready);
  void give(const uint8_t* data);

  // Waits for all digests, and returns the records that do not match theirs.
  std::vector<Rejected> settle();

  // Memory that the GPU can reach as well, at the same address; null if there is none.
  void* shared(size_t size);
  void release(void* memory);

 private:
  struct Task;
  struct Job;
  struct Round;

  // Reads all of a round and calls `arrived` for each task in turn; it may set its job's status.
  template <class Arrived>
  void run(Round& round, const Arrived& arrived);
  int fill(Round& round, const Shelf* shelf, int count, const int* experts, const int* slots);
  void finish(Round& round);
  int copy(const Job& job, const Task& task) const;
  static void widen(const Job& job, const Task& task);
  void announce();
  void help();
  static void read(Round& round);
  bool hash();

  Cuda cuda_;
  void* stream_ = nullptr;
  bool on_gpu_ = false, good_ = false;
  const int spins_;
  const size_t size_;
  struct Buffer {
    uint8_t* data;
    int holders;  // of what is in it: the one who fetches it, and its digest
    std::vector<uint8_t> stored;  // a record that must be widened into `data`
  };
  void let_go(size_t buffer);  // with `mutex_`

  std::vector<Buffer> buffers_;
  std::vector<size_t> free_;
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_, returned_;
  std::atomic<unsigned> news_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int> inside_{0};
  std::atomic<Round*> round_{nullptr};
  int asleep_ = 0, hashing_ = 0;
  std::deque<Job> to_hash_;
  std::vector<Rejected> rejected_;
};

}  // namespace squizd
