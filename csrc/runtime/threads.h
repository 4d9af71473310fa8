#pragma once

// A few threads that wait for work: steps of a network are short, so that starting threads for each would cost more
// than the step.

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace mixbit::runtime {

class Threads {
 public:
  explicit Threads(int count) {
    try {
      for (int i = 1; i < count; ++i) workers_.emplace_back([this, i] { work(i); });
    } catch (...) {
      stop();
      throw;
    }
  }
  ~Threads() { stop(); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  int count() const { return static_cast<int>(workers_.size()) + 1; }

  // f(thread, part) for every part; thread is below count(), and no two calls with one thread run at once. f must not
  // throw. One caller at a time.
  template <typename F>
  void run(int64_t parts, const F& f) {
    if (workers_.empty() || parts <= 1) {
      for (int64_t part = 0; part < parts; ++part) f(0, part);
      return;
    }
    call_ = [](const void* context, int thread, int64_t part) { (*static_cast<const F*>(context))(thread, part); };
    context_ = &f;
    parts_ = parts;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    wake();
    take_parts(0);
    for (int busy = busy_.load(std::memory_order_acquire); busy != 0; busy = busy_.load(std::memory_order_acquire)) {
      busy_.wait(busy, std::memory_order_acquire);
    }
  }

 private:
  void stop() {
    stop_ = true;
    wake();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  void wake() {
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
  }

  void work(int thread) {
    uint32_t seen = 0;
    for (;;) {
      round_.wait(seen, std::memory_order_acquire);
      seen = round_.load(std::memory_order_acquire);
      if (stop_) return;
      take_parts(thread);
      if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_one();
    }
  }

  void take_parts(int thread) {
    for (;;) {
      const int64_t part = next_.fetch_add(1, std::memory_order_relaxed);
      if (part >= parts_) return;
      call_(context_, thread, part);
    }
  }

  std::vector<std::thread> workers_;
  std::atomic<uint32_t> round_{0};
  std::atomic<int> busy_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<bool> stop_{false};
  void (*call_)(const void*, int, int64_t) = nullptr;
  const void* context_ = nullptr;
  int64_t parts_ = 0;
};

}  // namespace mixbit::runtime
