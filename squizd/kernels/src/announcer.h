// Tells the system what to read, from a thread of its own: that call waits while the disk's queue is full.
#pragma once
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "records.h"

namespace squizd {

// Lives as long as the process.
class Announcer {
 public:
  // `records` must stay until `forget` has been called for them. Throws std::system_error if there can be no thread.
  void add(const Records& records, int index) {
    std::lock_guard lock(mutex_);
    if (!running_) std::thread([this] { work(); }).detach();
    running_ = true;
    todo_.push_back({&records, index});
    wake_.notify_one();
  }

  // What of `records` has not been announced yet shall not be; with `wait` nothing looks at them any more afterwards.
  void forget(const Records& records, bool wait) {
    std::unique_lock lock(mutex_);
    std::erase_if(todo_, [&](const Task& task) { return task.records == &records; });
    if (wait) idle_.wait(lock, [&] { return current_ != &records; });
  }

 private:
  struct Task {
    const Records* records;
    int index;
  };
  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return !todo_.empty(); });
      const Task task = todo_.front();
      todo_.pop_front();
      current_ = task.records;
      lock.unlock();
      task.records->announce(task.index);
      lock.lock();
      current_ = nullptr;
      idle_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  std::deque<Task> todo_;
  const Records* current_ = nullptr;
  bool running_ = false;
};

}  // namespace squizd
