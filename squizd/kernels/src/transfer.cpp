#include "transfer.h"

#include <dlfcn.h>
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <type_traits>
#include <utility>

#include "codes.h"
#include "hash.h"

namespace squizd {

constexpr size_t CHUNK = 512 << 10;  // what one thread reads at a time

bool Cuda::load(const char* name) {
  void* library = dlopen(name, RTLD_NOW | RTLD_GLOBAL);
  if (!library) return false;
  auto find = [&](const char* symbol, auto& to) { return (to = reinterpret_cast<std::decay_t<decltype(to)>>(dlsym(library, symbol))) != nullptr; };
  return find("cudaHostAlloc", alloc) && find("cudaFreeHost", free) && find("cudaStreamCreateWithFlags", create) &&
         find("cudaMemcpyAsync", copy) && find("cudaStreamSynchronize", wait) && find("cudaStreamDestroy", destroy);
}

bool Shelf::as_stored(const Record& record) const {
  const auto& layout = layouts[record.layout];
  for (size_t i = 0; i < parts.size(); i++)
    if (layout[i].narrow != layout[i].wide || layout[i].offset != parts[i].offset) return false;
  return true;
}

size_t Shelf::cut(const Record& record, size_t at) const {
  for (const Stored& part : layouts[record.layout])
    if (part.narrow != part.wide && part.offset < at && at < part.offset + part.size) return at - (at - part.offset) % size_t(part.narrow);
  return std::min(at, size_t(record.size));
}

// A piece of a record that one thread reads: bytes [begin, end) of it, as stored.
struct Transfer::Task {
  int job;
  size_t begin, end;
  std::atomic<int> state{WAITING};
  int status = 0;
  enum { WAITING, READ };
};

struct Transfer::Job {
  const Shelf* shelf = nullptr;
  int expert = 0, slot = 0, status = 0;
  size_t buffer = 0;
  uint8_t *data = nullptr, *stored = nullptr;  // as slots hold it, and as the file does: where nothing is widened the same
  const Record& record() const { return shelf->records[size_t(expert)]; }
};

// What one call of `fetch` has in hand; its threads take the tasks in order.
struct Transfer::Round {
  std::vector<Job> jobs;
  std::deque<Task> tasks;
  std::atomic<size_t> next{0};
};

Transfer::Transfer(int threads, int spins, int buffers, size_t buffer_bytes, const char* library)
    : spins_(spins), size_(buffer_bytes) {
  if (library && *library) {
    if (!cuda_.load(library) || cuda_.create(&stream_, 1) != 0) return;  // 1: does not wait for the default stream
    on_gpu_ = true;
  }
  for (int i = 0; i < buffers; i++) {
    void* memory = nullptr;
    if (on_gpu_ ? cuda_.alloc(&memory, size_, 0) != 0 : posix_memalign(&memory, 4096, size_) != 0) return;
    free_.push_back(buffers_.size());
    buffers_.push_back({static_cast<uint8_t*>(memory), 0, {}});
  }
  for (int i = 0; i < threads; i++) threads_.emplace_back([this] { help(); });
  good_ = !threads_.empty() && !buffers_.empty();
}

Transfer::~Transfer() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
    news_.fetch_add(1);
  }
  wake_.notify_all();
  for (auto& thread : threads_) thread.join();
  if (stream_) cuda_.destroy(stream_);
  for (const Buffer& buffer : buffers_) release(buffer.data);
}

template <class Arrived>
void Transfer::run(Round& round, const Arrived& arrived) {
  round_.store(&round);
  announce();
  for (Task& task : round.tasks) {
    for (int spins = 0; task.state.load(std::memory_order_acquire) == Task::WAITING; spins++)
      spins < spins_ ? pause() : std::this_thread::yield();
    arrived(task, round.jobs[size_t(task.job)]);
  }
  round_.store(nullptr);
  while (inside_.load() > 0) pause();
}

// Puts as many records into a round as there is memory for, at least one; returns how many.
int Transfer::fill(Round& round, const Shelf* shelf, int count, const int* experts, const int* slots) {
  std::unique_lock lock(mutex_);
  returned_.wait(lock, [&] { return !free_.empty(); });
  const int some = std::min<int>(count, int(free_.size()));
  round.jobs.resize(size_t(some));
  for (int i = 0; i < some; i++) {
    Job& job = round.jobs[size_t(i)];
    job.shelf = shelf, job.expert = experts[i], job.slot = slots ? slots[i] : 0;
    job.buffer = free_.back();
    free_.pop_back();
    Buffer& buffer = buffers_[job.buffer];
    job.data = job.stored = buffer.data;
    if (!shelf->as_stored(job.record())) {
      if (buffer.stored.size() < job.record().size) buffer.stored.resize(job.record().size);
      job.stored = buffer.stored.data();
    }
    for (size_t at = 0, end; at < job.record().size; at = end) {
      end = shelf->cut(job.record(), at + CHUNK);
      Task& task = round.tasks.emplace_back();
      task.job = i, task.begin = at, task.end = end;
    }
  }
  return some;
}

void Transfer::fetch(const Shelf* shelf, int count, const int* experts, const int* slots, int* status) {
  for (int done = 0; done < count;) {
    Round round;
    const int some = fill(round, shelf, count - done, experts + done, slots + done);
    // The threads read; this one copies what is read, so that CUDA is called by one thread only.
    run(round, [&](const Task& task, Job& job) {
      if (!job.status) job.status = task.status ? task.status : copy(job, task);
    });
    if (on_gpu_ && cuda_.wait(stream_) != 0)
      for (Job& job : round.jobs)
        if (!job.status) job.status = CUDA_FAILED;
    finish(round);
    for (int i = 0; i < some; i++) status[done++] = round.jobs[size_t(i)].status;
  }
}

void Transfer::lend(const Shelf* shelf, int count, const int* experts, const Ready& ready) {
  for (int done = 0; done < count;) {
    Round round;
    const int some = fill(round, shelf, count - done, experts + done, nullptr);
    run(round, [&](const Task& task, Job& job) {
      if (!job.status) job.status = task.status;
      if (task.end < job.record().size) return;
      if (!job.status) {
        std::lock_guard lock(mutex_);
        buffers_[job.buffer].holders++;
      }
      ready(done + task.job, job.status ? nullptr : job.data, job.status);
    });
    finish(round);
    done += some;
  }
}

void Transfer::give(const uint8_t* data) {
  {
    std::lock_guard lock(mutex_);
    for (size_t i = 0; i < buffers_.size(); i++)
      if (buffers_[i].data == data) let_go(i);
  }
  returned_.notify_all();
}

void Transfer::let_go(size_t buffer) {
  if (--buffers_[buffer].holders == 0) free_.push_back(buffer);
}

// What arrived is hashed, what did not is free again.
void Transfer::finish(Round& round) {
  {
    std::lock_guard lock(mutex_);
    for (const Job& job : round.jobs) {
      buffers_[job.buffer].holders++;
      if (job.status) let_go(job.buffer);
      else to_hash_.push_back(job);
    }
  }
  announce();
}

std::vector<Rejected> Transfer::settle() {
  std::unique_lock lock(mutex_);
  returned_.wait(lock, [&] { return to_hash_.empty() && hashing_ == 0; });
  return std::exchange(rejected_, {});
}

void* Transfer::shared(size_t size) {
  void* memory = nullptr;
  return (on_gpu_ ? cuda_.alloc(&memory, size, 3) != 0 : posix_memalign(&memory, 4096, size) != 0) ? nullptr : memory;  // 3: portable, mapped
}

void Transfer::release(void* memory) { on_gpu_ ? void(cuda_.free(memory)) : ::free(memory); }

int Transfer::copy(const Job& job, const Task& task) const {
  const auto& layout = job.shelf->layouts[job.record().layout];
  for (size_t i = 0; i < layout.size(); i++) {
    const Part& part = job.shelf->parts[i];
    const Stored& stored = layout[i];
    const size_t first = std::max(task.begin, stored.offset), last = std::min(task.end, stored.offset + stored.size);
    if (first >= last) continue;
    const size_t from = stored.widened(first - stored.offset), to = stored.widened(last - stored.offset);
    uint8_t* target = part.to + part.stride * size_t(job.slot) + from;
    const uint8_t* source = job.data + part.offset + from;
    if (!on_gpu_) memcpy(target, source, to - from);
    else if (cuda_.copy(target, source, to - from, 1, stream_) != 0) return CUDA_FAILED;  // 1: host to device
  }
  return 0;
}

void Transfer::widen(const Job& job, const Task& task) {
  const auto& layout = job.shelf->layouts[job.record().layout];
  for (size_t i = 0; i < layout.size(); i++) {
    const Stored& stored = layout[i];
    const size_t first = std::max(task.begin, stored.offset), last = std::min(task.end, stored.offset + stored.size);
    if (first >= last) continue;
    uint8_t* to = job.data + job.shelf->parts[i].offset + stored.widened(first - stored.offset);
    if (stored.narrow == stored.wide) memcpy(to, job.stored + first, last - first);
    else widen_codes(job.stored + first, last - first, stored.narrow, stored.wide, to);
  }
}

void Transfer::announce() {
  bool sleepers;
  {
    std::lock_guard lock(mutex_);
    news_.fetch_add(1);
    sleepers = asleep_ > 0;
  }
  if (sleepers) wake_.notify_all();
}

void Transfer::help() {
  for (unsigned seen = 0;;) {
    inside_.fetch_add(1);
    if (Round* round = round_.load()) read(*round);
    inside_.fetch_sub(1);
    if (hash()) continue;
    for (int spins = 0; news_.load(std::memory_order_acquire) == seen && spins < spins_; spins++) pause();
    if (news_.load(std::memory_order_acquire) == seen) {
      std::unique_lock lock(mutex_);
      asleep_++;
      wake_.wait(lock, [&] { return news_.load() != seen; });
      asleep_--;
    }
    seen = news_.load();
    if (stop_.load()) return;
  }
}

void Transfer::read(Round& round) {
  for (size_t i; (i = round.next.fetch_add(1)) < round.tasks.size();) {
    Task& task = round.tasks[i];
    const Job& job = round.jobs[size_t(task.job)];
    for (size_t at = task.begin; at < task.end && !task.status;) {
      const ssize_t n = pread(job.shelf->fd, job.stored + at, task.end - at, off_t(job.record().offset + at));
      if (n > 0) at += size_t(n);
      else if (n == 0) task.status = CUT_SHORT;
      else if (errno != EINTR) task.status = errno;
    }
    if (!task.status && job.stored != job.data) widen(job, task);
    task.state.store(Task::READ, std::memory_order_release);
  }
}

// Computes one digest, if one is wanted.
bool Transfer::hash() {
  Job job;
  {
    std::lock_guard lock(mutex_);
    if (to_hash_.empty()) return false;
    job = to_hash_.front();
    to_hash_.pop_front();
    hashing_++;
  }
  squizd::Hash hash;
  hash.add(job.stored, job.record().size);
  const bool same = hash.digest() == job.record().digest;
  {
    std::lock_guard lock(mutex_);
    hashing_--;
    if (!same) rejected_.push_back({job.shelf, job.expert});
    let_go(job.buffer);
  }
  returned_.notify_all();
  return true;
}

}  // namespace squizd
