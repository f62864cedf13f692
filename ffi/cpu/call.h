// call.h: one transform, quantised or not, shared out between threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>

#include "../problem.h"
#include "../quantization.h"

namespace jax_hadacore::cpu {

// Memory that starts on a cache line, so that no vector lies across two.
struct FreeAligned {
  void operator()(char* memory) const;
};
using Scratch = std::unique_ptr<char[], FreeAligned>;

// How many of `available` threads a problem is worth.
int64_t ThreadsWorth(const Problem& problem, int64_t available);

// Threads take units of work in turn. One that comes late takes few or none, and one that has nothing left to take
// waits only for units that others are working on, never for others to start.
//
// A unit is a slice of the rows; or, where there are fewer rows than threads, the work has phases:
//   0:       each part of a row is transformed by itself: the strides below the part's length;
//   1, 2, .. eight neighbouring parts are joined into one, column by column: the next three strides. Where there are
//            factors, the parts are of n / (the first factor's order), and its step joins them, in phase 1.
// Either way an element's sums are the same tree. To be quantised, rows are always sliced, and groups never cut: a
// thread has each to itself.
class Call {
 public:
  // For `threads` threads. Throw std::bad_alloc.
  Call(const Problem& problem, const void* x, void* y, int64_t threads);
  Call(const Problem& problem, const Quantization& quantization, const void* x, const QuantizedBuffers& results,
       int64_t threads);

  // Takes part as one of the threads, numbered from 0. Returns when no unit is left to take.
  void Work(int64_t thread);

  // Returns when all work is done. For a thread that has taken part: after that, the call's buffers are not touched any
  // more, not even by threads that come later.
  void Wait() const { WaitFor(phases_ - 1); }

 private:
  static constexpr int kMaxPhases = 3;
  struct Phase {
    int64_t units = 0;
    std::atomic<int64_t> taken{0}, done{0};
  };

  // Of a call whose units are slices of `least` rows or a multiple.
  void SliceRows(int64_t least, int64_t threads);
  void PrepareSteps(int64_t threads);
  void Do(int phase, int64_t unit, int64_t thread) const;
  void WaitFor(int phase) const;

  const Problem problem_;
  const void* const x_;
  void* const y_ = nullptr;
  const std::optional<Quantization> quantization_;
  const QuantizedBuffers results_ = {};
  int64_t part_ = 0;  // the length of a part, or 0 where units are slices of the rows
  int phases_ = 1;
  Phase phase_[kMaxPhases];
  int64_t buffer_bytes_ = 0;  // of a thread; 0 where all threads share a buffer
  int64_t step_bytes_ = 0;    // of a thread
  Scratch buffers_, steps_;
  std::unique_ptr<uint16_t[]> picks_[2];
};

// The whole transform on threads of its own, for tests.
void Transform(const Problem& problem, const void* x, void* y, int64_t threads);
void TransformAndQuantize(const Problem& problem, const Quantization& quantization, const void* x,
                          const QuantizedBuffers& results, int64_t threads);

}  // namespace jax_hadacore::cpu
