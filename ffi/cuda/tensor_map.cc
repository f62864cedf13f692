// tensor_map.cc: asks the driver for tensor maps.
#include "tensor_map.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace jax_hadacore::cuda {
namespace {

static_assert(sizeof(CUtensorMap) == kMapWords * sizeof(uint32_t));

using Encode = decltype(&cuTensorMapEncodeTiled);

// The library is not linked with the driver's.
Encode FindEncode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

}  // namespace

std::optional<Words> TensorMap(const void* x, int64_t rows, int64_t n, const RingLayout& ring) {
  static const Encode encode = FindEncode();
  if (!encode) return std::nullopt;
  const auto line = static_cast<cuuint64_t>(ring.Line()), a = static_cast<cuuint64_t>(ring.columns) * 16;  // bytes
  const cuuint64_t sizes[] = {line / 2, static_cast<cuuint64_t>(ring.order), static_cast<cuuint64_t>(ring.Planes()),
                              static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {a, line, static_cast<cuuint64_t>(2 * n)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(ring.Line() / 2), static_cast<cuuint32_t>(ring.Box()), 1, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(x), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, ring.Line() == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return std::nullopt;
  const auto* words = reinterpret_cast<const uint32_t*>(&map);
  return Words(words, words + kMapWords);
}

}  // namespace jax_hadacore::cuda
