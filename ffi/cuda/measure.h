// measure.h: device times of a transform and of copies of the same bytes, side by side; and a transform on raw
// pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "launch.h"

namespace jax_hadacore::cuda {

// Milliseconds of one launch, one value for each replay of a captured graph.
struct Times {
  std::string name;
  std::vector<float> milliseconds;
};

// Times the transform, a copy kernel and cudaMemcpyAsync. `buffers` hold `sets` operands one after the other; a graph
// has `launches` launches that take the sets in turn (many sets: cold caches; one: warm), and the graphs are replayed
// in turn, `replays` times each. Throws std::runtime_error with CUDA's message.
std::vector<Times> Measure(const Problem& problem, const Buffers& buffers, int sets, int launches, int replays);

// The same of a transform whose results become codes, against kernels that read and write as many bytes: `sets` of x,
// and of codes and scales, lie one after the other.
std::vector<Times> MeasureCodes(const Problem& problem, const Quantization& quantization, const void* x,
                                const QuantizedBuffers& results, int sets, int launches, int replays);

// Transforms on a stream of its own and waits. Throws std::runtime_error with CUDA's message.
void TransformAndWait(const Problem& problem, const Buffers& buffers);
void QuantizeAndWait(const Problem& problem, const Quantization& quantization, const void* x,
                     const QuantizedBuffers& results);

}  // namespace jax_hadacore::cuda
