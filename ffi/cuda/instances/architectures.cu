// architectures.cu: what nvcc was told to compile the kernels for.
#include "../kernels.h"

namespace jax_hadacore::cuda {

bool WaitsForPreviousLaunch(int major, int minor) {
#ifdef __CUDA_ARCH_LIST__
  constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};  // 900 for sm_90
#else
  constexpr int kArchitectures[] = {900};
#endif
  for (const int architecture : kArchitectures)
    if (architecture >= 900 && architecture / 100 == major && architecture / 10 % 10 <= minor) return true;
  return false;
}

}  // namespace jax_hadacore::cuda
