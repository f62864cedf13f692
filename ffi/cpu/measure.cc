// measure.cc: times on threads that start together.
#include "measure.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>

#include "call.h"

namespace jax_hadacore::cpu {
namespace {

constexpr double kShortest = 0.1;  // milliseconds that can be timed well

// Milliseconds until work(thread) has returned on all threads.
double Time(int64_t threads, const std::function<void(int64_t)>& work) {
  std::atomic<int64_t> waiting{0}, left{threads - 1};
  std::atomic<bool> go{false};
  std::vector<std::thread> others;
  for (int64_t thread = 1; thread < threads; ++thread) {
    others.emplace_back([&, thread] {
      ++waiting;
      while (!go) std::this_thread::yield();
      work(thread);
      --left;
    });
  }
  while (waiting < threads - 1) std::this_thread::yield();
  const auto start = std::chrono::steady_clock::now();
  go = true;
  work(0);
  while (left > 0) std::this_thread::yield();
  const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
  for (std::thread& other : others) other.join();
  return time.count();
}

int64_t Bytes(const Problem& p) {
  const int64_t element = p.dtype == Dtype::kF64 ? 8 : p.dtype == Dtype::kF32 ? 4 : 2;
  return p.rows * p.n * element;
}

}  // namespace

Times Measure(const Problem& problem, const void* x, void* y, int threads, int repetitions) {
  const int64_t bytes = Bytes(problem);
  if (bytes == 0 || threads < 1 || repetitions < 1)
    throw std::invalid_argument("a measurement takes one element, thread and repetition or more, got " +
                                std::to_string(bytes) + " bytes, " + std::to_string(threads) + " threads and " +
                                std::to_string(repetitions) + " repetitions");
  const std::unique_ptr<char[]> other(x == y ? new char[static_cast<size_t>(bytes)] : nullptr);
  char* copy = other ? other.get() : static_cast<char*>(y);

  // Calls follow each other on one thread only: on several, each begins with all of them awake.
  const auto transform = [&](int64_t calls) {
    if (threads == 1)
      return Time(1, [&](int64_t) {
        for (int64_t i = 0; i < calls; ++i) Call(problem, x, y, 1).Work(0);
      });
    Call call(problem, x, y, threads);
    return Time(threads, [&](int64_t thread) { call.Work(thread); });
  };
  const auto memcpy = [&](int64_t calls) {
    return Time(threads, [&](int64_t thread) {
      const int64_t first = bytes * thread / threads, last = bytes * (thread + 1) / threads;
      for (int64_t i = 0; i < calls; ++i) {
        std::memcpy(copy + first, static_cast<const char*>(x) + first, static_cast<size_t>(last - first));
        std::atomic_signal_fence(std::memory_order_seq_cst);  // so that none is left out
      }
    });
  };
  const auto calls_that_fill = [&](double once) {
    return threads == 1 ? std::max<int64_t>(1, static_cast<int64_t>(kShortest / std::max(once, 1e-5))) : 1;
  };
  memcpy(1), transform(1);  // to warm up
  const int64_t copies = calls_that_fill(memcpy(1)), transforms = calls_that_fill(transform(1));
  Times times;
  for (int repetition = 0; repetition < repetitions; ++repetition) {
    times.memcpy.push_back(memcpy(copies) / static_cast<double>(copies));
    times.transform.push_back(transform(transforms) / static_cast<double>(transforms));
  }
  return times;
}

}  // namespace jax_hadacore::cpu
