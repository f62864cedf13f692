// hadamard.cc: chooses the instruction set and keeps subnormal numbers.
#include "hadamard.h"

#include <atomic>
#include <cstring>

#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace jax_hadacore::cpu {
namespace {

// The instruction sets that this processor has, widest first, up to a null.
const Isa* const* AvailableIsas() {
#if defined(__x86_64__)
  static const auto isas = [] {
    struct List {
      const Isa* isa[4] = {};
    } list;
    int count = 0;
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      list.isa[count++] = &kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      list.isa[count++] = &kAvx2;
    list.isa[count] = &kBaseline;
    return list;
  }();
  return isas.isa;
#else
  static const Isa* const isas[] = {&kBaseline, nullptr};
  return isas;
#endif
}

std::atomic<const Isa*> selected{nullptr};

// XLA's threads run with subnormal numbers flushed to zero; this keeps them for its lifetime.
class KeepSubnormals {
 public:
#if defined(__x86_64__)
  KeepSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~0x8040u); }  // FTZ and DAZ
  ~KeepSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  KeepSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ & ~uint64_t{0x1080000}));  // FZ and FZ16
  }
  ~KeepSubnormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

}  // namespace

const Isa& CurrentIsa() {
  const Isa* isa = selected.load(std::memory_order_relaxed);
  return isa ? *isa : *AvailableIsas()[0];
}

bool SelectIsa(const char* name) {
  for (const Isa* const* isa = AvailableIsas(); *isa; ++isa) {
    if (std::strcmp((*isa)->name, name) == 0) {
      selected.store(*isa, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

void TransformRows(const Problem& problem, Range rows, const void* x, void* y, const Memory& memory) {
  const KeepSubnormals guard;
  CurrentIsa().transform_rows(problem, rows, x, y, memory);
}

void TransformParts(const Problem& problem, int64_t length, Range parts, const void* x, void* y, const Memory& memory) {
  const KeepSubnormals guard;
  CurrentIsa().transform_parts(problem, length, parts, x, y, memory);
}

void JoinColumns(const Problem& problem, int64_t h, Range columns, void* y, const Memory& memory) {
  const KeepSubnormals guard;
  CurrentIsa().join_columns(problem, h, columns, y, memory);
}

void QuantizeRows(const Problem& problem, const Quantization& quantization, Range rows, const void* x,
                  const QuantizedBuffers& results, const Memory& memory) {
  const KeepSubnormals guard;
  CurrentIsa().quantize_rows(problem, quantization, rows, x, results, memory);
}

}  // namespace jax_hadacore::cpu
