// Threads that help whoever calls `run`. They spin for some microseconds after work, then sleep.
#pragma once
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "pause.h"

namespace squizd {

class Pool {
 public:
  explicit Pool(int threads) : workers_(threads > 1 ? threads : 1), tiles_(size_t(workers_)) {
    for (int i = 1; i < workers_; i++) threads_.emplace_back([this, i] { help(i); });
  }
  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
      round_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }
  Pool(const Pool&) = delete;

  int workers() const { return workers_; }

  // Memory of one worker, kept between jobs; only for use inside a job.
  float* tile(int worker, size_t floats) {
    auto& mine = tiles_[size_t(worker)];
    if (mine.size() < floats) mine.resize(floats);
    return mine.data();
  }

  // job(task, worker) for task in [0, tasks), each once, on any of `workers()` threads; returns when all are done.
  // Jobs run one at a time: callers wait for each other. A job must not throw.
  template <class Job>
  void run(int tasks, bool alone, const Job& job) {
    std::lock_guard turn(busy_);
    if (alone || tasks < 2 || workers_ == 1) {
      for (int task = 0; task < tasks; task++) job(task, 0);
      return;
    }
    job_ = &job;
    call_ = [](const void* j, int task, int worker) { (*static_cast<const Job*>(j))(task, worker); };
    tasks_ = tasks;
    next_.store(0, std::memory_order_relaxed);
    open_.store(true);
    bool sleepers;
    {
      std::lock_guard lock(mutex_);
      round_.fetch_add(1);
      sleepers = asleep_ > 0;
    }
    if (sleepers) wake_.notify_all();
    work(0);
    // A helper that is not inside by now finds the job closed, so a slow waking costs nothing.
    open_.store(false);
    while (inside_.load() > 0) pause();
  }

 private:
  static constexpr int SPINS = 2000;

  void work(int worker) {
    for (int task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) call_(job_, task, worker);
  }

  void help(int worker) {
    unsigned seen = 0;
    for (;;) {
      int spins = 0;
      while (round_.load(std::memory_order_acquire) == seen && spins++ < SPINS) pause();
      if (round_.load(std::memory_order_acquire) == seen) {
        std::unique_lock lock(mutex_);
        asleep_++;
        wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
        asleep_--;
      }
      seen = round_.load(std::memory_order_acquire);
      if (stop_.load()) return;
      inside_.fetch_add(1);
      if (open_.load()) work(worker);
      inside_.fetch_sub(1);
    }
  }

  const int workers_;
  std::vector<std::vector<float>> tiles_;
  std::vector<std::thread> threads_;
  std::mutex busy_, mutex_;
  std::condition_variable wake_;
  std::atomic<unsigned> round_{0};
  std::atomic<int> next_{0}, inside_{0};
  std::atomic<bool> open_{false}, stop_{false};
  int asleep_ = 0, tasks_ = 0;
  const void* job_ = nullptr;
  void (*call_)(const void*, int, int) = nullptr;
};

}  // namespace squizd
