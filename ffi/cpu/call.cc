// call.cc: how much work is worth a thread, and where rows are cut.
#include "call.h"

#include <algorithm>
#include <new>
#include <thread>

#include "hadamard.h"

namespace jax_hadacore::cpu {
namespace {

// Below this many bytes of accumulators a second thread costs more than it saves.
constexpr int64_t kBytesPerThread = 128 * 1024;
// Units for each thread, so that all end at about the same time on cores of unequal speed.
constexpr int64_t kUnitsPerThread = 4;
// Shorter rows are not cut: eight or 64 parts of one, and an eighth of its columns, fill vectors of every kind.
constexpr int64_t kShortestCut = 1 << 14;
// Units of columns begin on cache lines of every element type.
constexpr int64_t kColumns = 64;
constexpr std::align_val_t kCacheLine{64};

}  // namespace

void FreeAligned::operator()(char* memory) const { ::operator delete[](memory, kCacheLine); }

int64_t ThreadsWorth(const Problem& problem, int64_t available) {
  const int64_t bytes = problem.rows * problem.n * AccumulatorBytes(problem.dtype);
  return std::max<int64_t>(1, std::min(bytes / kBytesPerThread, available));
}

Call::Call(const Problem& problem, const void* x, void* y, int64_t threads) : problem_(problem), x_(x), y_(y) {
  const int64_t elements = problem.rows * problem.n, units = threads == 1 ? 1 : kUnitsPerThread * threads;
  if (problem.n < kShortestCut || 2 * problem.rows > threads) {
    phase_[0].units = std::min(units, problem.rows);
  } else {
    phases_ = threads <= kJoined ? 2 : 3;
    part_ = problem.n;
    for (int phase = 1; phase < phases_; ++phase) {
      part_ /= kJoined;
      phase_[phase].units = std::min(units, elements / kJoined / kColumns);
    }
    phase_[0].units = elements / part_;
  }
  if (!AccumulatesInPlace(problem.dtype)) {
    const int64_t buffers = part_ ? problem.rows : threads;
    const auto bytes = static_cast<size_t>(buffers * problem.n * AccumulatorBytes(problem.dtype));
    scratch_.reset(new (kCacheLine) char[bytes]);
  }
}

void Call::Work(int64_t thread) {
  for (int phase = 0; phase < phases_; ++phase) {
    if (phase > 0) WaitFor(phase - 1);
    for (;;) {
      const int64_t unit = phase_[phase].taken.fetch_add(1, std::memory_order_relaxed);
      if (unit >= phase_[phase].units) break;
      Do(phase, unit, thread);
      phase_[phase].done.fetch_add(1, std::memory_order_release);
    }
  }
}

void Call::Do(int phase, int64_t unit, int64_t thread) const {
  const auto share = [&](int64_t count) {  // this unit's share of `count` things
    return Range{count * unit / phase_[phase].units, count * (unit + 1) / phase_[phase].units};
  };
  if (part_ == 0) {
    char* buffer = scratch_.get();
    if (buffer) buffer += thread * problem_.n * AccumulatorBytes(problem_.dtype);
    return TransformRows(problem_, share(problem_.rows), x_, y_, buffer);
  }
  void* buffer = scratch_ ? scratch_.get() : y_;
  if (phase == 0) return TransformParts(problem_, part_, {unit, unit + 1}, x_, buffer);
  int64_t h = part_;
  for (int done = 1; done < phase; ++done) h *= kJoined;
  const Range blocks = share(problem_.rows * problem_.n / kJoined / kColumns);
  JoinColumns(problem_, h, {blocks.first * kColumns, blocks.last * kColumns}, buffer, y_);
}

void Call::WaitFor(int phase) const {
  while (phase_[phase].done.load(std::memory_order_acquire) < phase_[phase].units) std::this_thread::yield();
}

}  // namespace jax_hadacore::cpu
