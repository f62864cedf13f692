// measure.cu: device times from replayed CUDA graphs.
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>

#include "measure.h"

namespace jax_hadacore::cuda {
namespace {

void Check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

constexpr int kCopyThreads = 256;

// A copy as a kernel, of `vectors` of 16 bytes: one a thread, which was faster than several (docs/kernel.md).
__global__ void __launch_bounds__(kCopyThreads) Copy(const uint4* x, uint4* y, int64_t vectors) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCopyThreads + threadIdx.x;
  if (i < vectors) y[i] = x[i];
}

// What the transform to codes moves: of 16-bit elements kVectors times 16 bytes a thread, and kBits of code for each.
template <int kVectors, int kBits>
__global__ void __launch_bounds__(kCopyThreads) Narrow(const uint4* x, uint32_t* codes, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCopyThreads + threadIdx.x;
  if (i >= count) return;
  constexpr int kWords = kVectors * kBits / 4;  // of codes
  uint32_t words[kWords];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const uint4 q = x[i * kVectors + v];
    if constexpr (kBits == 8) {
      words[2 * v] = q.x ^ q.y, words[2 * v + 1] = q.z ^ q.w;
    } else {
      words[v] = q.x ^ q.y ^ q.z ^ q.w;
    }
  }
  if constexpr (kWords == 4) {
    reinterpret_cast<uint4*>(codes)[i] = make_uint4(words[0], words[1], words[2], words[3]);
  } else if constexpr (kWords == 2) {
    reinterpret_cast<uint2*>(codes)[i] = make_uint2(words[0], words[1]);
  } else {
    codes[i] = words[0];
  }
}

int64_t Bytes(const Problem& p) {
  const int64_t element = p.dtype == Dtype::kF64 ? 8 : p.dtype == Dtype::kF32 ? 4 : 2;
  return p.rows * p.n * element;
}

class Stream {
 public:
  Stream() { Check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  Event() { Check(cudaEventCreate(&event_)); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  operator cudaEvent_t() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

class Graph {
 public:
  // Captures `launches` calls of enqueue(launch, stream).
  Graph(cudaStream_t stream, int launches, const std::function<cudaError_t(int, cudaStream_t)>& enqueue) {
    cudaGraph_t graph = nullptr;
    cudaError_t error = cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
    for (int launch = 0; launch < launches && error == cudaSuccess; ++launch) error = enqueue(launch, stream);
    const cudaError_t ended = cudaStreamEndCapture(stream, &graph);
    if (error == cudaSuccess) error = ended;
    if (error == cudaSuccess) error = cudaGraphInstantiate(&executable_, graph, 0);
    if (graph) cudaGraphDestroy(graph);
    Check(error);
  }
  ~Graph() {
    if (executable_) cudaGraphExecDestroy(executable_);
  }
  Graph(const Graph&) = delete;

  float Replay(cudaStream_t stream, const Event& start, const Event& stop) const {
    float milliseconds = 0;
    Check(cudaEventRecord(start, stream));
    Check(cudaGraphLaunch(executable_, stream));
    Check(cudaEventRecord(stop, stream));
    Check(cudaEventSynchronize(stop));
    Check(cudaEventElapsedTime(&milliseconds, start, stop));
    return milliseconds;
  }

 private:
  cudaGraphExec_t executable_ = nullptr;
};

// The graphs in turn.
std::vector<Times> Replays(const std::vector<std::pair<const char*, const Graph*>>& graphs, cudaStream_t stream,
                           int launches, int replays) {
  const Event start, stop;
  std::vector<Times> times;
  for (const auto& [name, graph] : graphs) times.push_back({name, {}});
  for (int replay = -1; replay < replays; ++replay) {  // the first is to warm up
    for (size_t i = 0; i < times.size(); ++i) {
      const float milliseconds = graphs[i].second->Replay(stream, start, stop);
      if (replay >= 0) times[i].milliseconds.push_back(milliseconds / static_cast<float>(launches));
    }
  }
  return times;
}

}  // namespace

std::vector<Times> Measure(const Problem& problem, const Buffers& buffers, int sets, int launches, int replays) {
  const Stream stream;
  const int64_t bytes = Bytes(problem), vectors = bytes / 16;
  if (bytes == 0 || bytes % 16 || sets < 1 || launches < 1)
    throw std::runtime_error(
        "a measurement takes a multiple of 16 bytes, one set or more and one launch or more, got " +
        std::to_string(bytes) + " bytes, " + std::to_string(sets) + " sets and " + std::to_string(launches) +
        " launches");
  const auto set = [&](int launch) {
    const int64_t offset = launch % sets * bytes;
    return Buffers{static_cast<const char*>(buffers.x) + offset, static_cast<char*>(buffers.y) + offset,
                   buffers.workspace};
  };
  const Graph transform(stream, launches, [&](int launch, cudaStream_t s) { return Enqueue(problem, set(launch), s); });
  const Graph copy(stream, launches, [&](int launch, cudaStream_t s) {
    const Buffers b = set(launch);
    Copy<<<static_cast<unsigned>((vectors + kCopyThreads - 1) / kCopyThreads), kCopyThreads, 0, s>>>(
        static_cast<const uint4*>(b.x), static_cast<uint4*>(b.y), vectors);
    return cudaGetLastError();
  });
  const Graph memcpy(stream, launches, [&](int launch, cudaStream_t s) {
    const Buffers b = set(launch);
    return cudaMemcpyAsync(b.y, b.x, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, s);
  });
  return Replays({{"transform", &transform}, {"copy kernel", &copy}, {"cudaMemcpyAsync", &memcpy}}, stream, launches,
                 replays);
}

std::vector<Times> MeasureCodes(const Problem& problem, const Quantization& quantization, const void* x,
                                const QuantizedBuffers& results, int sets, int launches, int replays) {
  const Stream stream;
  const int64_t count = problem.rows * problem.n, groups = count / quantization.group,
                bits = CodeBits(quantization.code),
                scale = quantization.scale == Scale::kFloat32 ? 4
                        : quantization.scale == Scale::kGiven ? 0
                                                              : 1;
  if (count == 0 || count % (32 * kCopyThreads) || sets < 1 || launches < 1)
    throw std::runtime_error("a measurement takes a multiple of " + std::to_string(32 * kCopyThreads) + " elements");
  const auto x_of = [&](int launch) { return static_cast<const char*>(x) + launch % sets * 2 * count; };
  const auto results_of = [&](int launch) {
    const int64_t set = launch % sets;
    return QuantizedBuffers{static_cast<char*>(results.codes) + set * count * bits / 8,
                            scale ? static_cast<char*>(results.scales) + set * groups * scale : nullptr,
                            results.zero_points ? results.zero_points + set * groups : nullptr};
  };
  const Graph transform(stream, launches, [&](int launch, cudaStream_t s) {
    return EnqueueCodes(problem, quantization, x_of(launch), results_of(launch), s);
  });
  const auto narrow = [&](const auto& kernel, int64_t vectors) {
    return std::make_unique<Graph>(stream, launches, [&](int launch, cudaStream_t s) {
      const int64_t threads = count / 8 / vectors;
      kernel<<<static_cast<unsigned>(threads / kCopyThreads), kCopyThreads, 0, s>>>(
          reinterpret_cast<const uint4*>(x_of(launch)), static_cast<uint32_t*>(results_of(launch).codes), threads);
      return cudaGetLastError();
    });
  };
  const auto one = bits == 8 ? narrow(Narrow<1, 8>, 1) : narrow(Narrow<1, 4>, 1);
  const auto two = bits == 8 ? narrow(Narrow<2, 8>, 2) : narrow(Narrow<2, 4>, 2);
  return Replays({{"transform", &transform}, {"one vector", one.get()}, {"two vectors", two.get()}}, stream, launches,
                 replays);
}

void TransformAndWait(const Problem& problem, const Buffers& buffers) {
  const Stream stream;
  Check(Enqueue(problem, buffers, stream));
  Check(cudaStreamSynchronize(stream));
}

void QuantizeAndWait(const Problem& problem, const Quantization& quantization, const void* x,
                     const QuantizedBuffers& results) {
  const Stream stream;
  Check(EnqueueCodes(problem, quantization, x, results, stream));
  Check(cudaStreamSynchronize(stream));
}

}  // namespace jax_hadacore::cuda
