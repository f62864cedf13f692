// float8.cc: how quantizer.cuh rounds to float8 on GPUs without an instruction for it, those before sm_89.
#include "device.h"

#define __CUDA_ARCH__ 860
#define cuda before_sm89  // beside what the kernels are compiled to
#include "cuda/quantizer.cuh"

extern "C" void emulation_pack_float8(const float* values, int64_t count, bool e5m2, uint8_t* codes) {
  using namespace jax_hadacore::before_sm89;
  for (int64_t i = 0; i < count; i += 2) {
    const uint32_t pair = e5m2 ? PackE5M2(values[i], values[i + 1]) : PackE4M3(values[i], values[i + 1]);
    codes[i] = static_cast<uint8_t>(pair), codes[i + 1] = static_cast<uint8_t>(pair >> 8);
  }
}
