// call.cc: how much work is worth a thread, and where rows are cut.
#include "call.h"

#include <algorithm>
#include <new>
#include <thread>
#include <vector>

#include "factor_sums.h"
#include "hadamard.h"

namespace jax_hadacore::cpu {
namespace {

// Below this many bytes of accumulators of a power of two a second thread costs more than it saves.
constexpr int64_t kBytesPerThread = 128 * 1024;
// Units for each thread, so that all end at about the same time on cores of unequal speed.
constexpr int64_t kUnitsPerThread = 4;
// Shorter rows are not cut: eight or 64 parts of one, and an eighth of its columns, fill vectors of every kind.
constexpr int64_t kShortestCut = 1 << 14;
// Units of columns begin on cache lines of every element type, and on words of signs.
constexpr int64_t kColumns = 32;
constexpr std::align_val_t kCacheLine{64};

char* Allocate(int64_t bytes) { return new (kCacheLine) char[static_cast<size_t>(bytes)]; }

// Whether phases can share out a row.
bool CanCut(const Problem& problem) {
  return problem.n >= kShortestCut &&
         (problem.factor_count == 0 || problem.n / problem.factors[0].order % kColumns == 0);
}

int64_t Units(int64_t threads) { return threads == 1 ? 1 : kUnitsPerThread * threads; }

void WorkOnThreads(Call& call, int64_t threads) {
  std::vector<std::thread> others;
  for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back([&call, thread] { call.Work(thread); });
  call.Work(0);
  for (std::thread& other : others) other.join();
}

}  // namespace

void FreeAligned::operator()(char* memory) const { ::operator delete[](memory, kCacheLine); }

int64_t ThreadsWorth(const Problem& problem, int64_t available) {
  // The step of a factor takes as long as the butterflies, and so once more for every 40 of its order.
  int64_t effort = 1;
  for (int i = 0; i < problem.factor_count; ++i) effort += 1 + problem.factors[i].order / 40;
  const int64_t bytes = problem.rows * problem.n * AccumulatorBytes(problem.dtype) * effort;
  return std::max<int64_t>(1, std::min(bytes / kBytesPerThread, available));
}

Call::Call(const Problem& problem, const void* x, void* y, int64_t threads) : problem_(problem), x_(x), y_(y) {
  const int64_t elements = problem.rows * problem.n;
  if (!CanCut(problem) || 2 * problem.rows > threads) {
    SliceRows(1, threads);
  } else {
    phases_ = problem.factor_count || threads <= kJoined ? 2 : 3;
    part_ = problem.n;
    for (int phase = 1; phase < phases_; ++phase) {
      part_ /= PartsJoined(problem);
      phase_[phase].units = std::min(Units(threads), elements / PartsJoined(problem) / kColumns);
    }
    phase_[0].units = elements / part_;
  }
  if (!AccumulatesInPlace(problem.dtype)) {
    if (part_ == 0)
      buffer_bytes_ = (problem.factor_count ? RowsTogether(problem) : 1) * problem.n * AccumulatorBytes(problem.dtype);
    buffers_.reset(Allocate(part_ ? elements * AccumulatorBytes(problem.dtype) : threads * buffer_bytes_));
  }
  PrepareSteps(threads);
}

Call::Call(const Problem& problem, const Quantization& quantization, const void* x, const QuantizedBuffers& results,
           int64_t threads)
    : problem_(problem), x_(x), quantization_(quantization), results_(results) {
  SliceRows(RowsOfGroups(problem, quantization), threads);
  buffer_bytes_ = RowsQuantized(problem, quantization) * problem.n * AccumulatorBytes(problem.dtype);
  buffers_.reset(Allocate(threads * buffer_bytes_));
  PrepareSteps(threads);
}

void Call::SliceRows(int64_t least, int64_t threads) {
  least = std::max(least, RowsForStrips(problem_));
  phase_[0].units = std::min(Units(threads), (problem_.rows + least - 1) / least);
}

void Call::PrepareSteps(int64_t threads) {
  if (problem_.factor_count == 0) return;
  step_bytes_ = kTableBytes + SumsBytes(problem_);
  steps_.reset(Allocate(threads * step_bytes_));
  for (int i = 0; i < problem_.factor_count; ++i) picks_[i] = MakePicks(problem_.factors[i]);
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
  char *buffer = buffers_ ? buffers_.get() + thread * buffer_bytes_ : static_cast<char*>(y_),
       *step = steps_.get() + thread * step_bytes_;
  const Memory memory = {buffer, step, step + kTableBytes, {picks_[0].get(), picks_[1].get()}};
  if (quantization_) {
    const int64_t least = RowsOfGroups(problem_, *quantization_);
    const Range groups = share(problem_.rows / least);
    return QuantizeRows(problem_, *quantization_, {groups.first * least, groups.last * least}, x_, results_, memory);
  }
  if (part_ == 0) return TransformRows(problem_, share(problem_.rows), x_, y_, memory);
  if (phase == 0) return TransformParts(problem_, part_, {unit, unit + 1}, x_, y_, memory);
  int64_t h = part_;
  for (int done = 1; done < phase; ++done) h *= kJoined;
  const Range blocks = share(problem_.rows * problem_.n / PartsJoined(problem_) / kColumns);
  JoinColumns(problem_, h, {blocks.first * kColumns, blocks.last * kColumns}, y_, memory);
}

void Call::WaitFor(int phase) const {
  while (phase_[phase].done.load(std::memory_order_acquire) < phase_[phase].units) std::this_thread::yield();
}

void Transform(const Problem& problem, const void* x, void* y, int64_t threads) {
  Call call(problem, x, y, threads);
  WorkOnThreads(call, threads);
}

void TransformAndQuantize(const Problem& problem, const Quantization& quantization, const void* x,
                          const QuantizedBuffers& results, int64_t threads) {
  Call call(problem, quantization, x, results, threads);
  WorkOnThreads(call, threads);
}

}  // namespace jax_hadacore::cpu
