// measure.cu: device times from replayed CUDA graphs.
#include <cstdint>
#include <functional>
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

}  // namespace

std::vector<Times> Measure(const Problem& problem, const Buffers& buffers, int sets, int launches, int replays) {
  const Stream stream;
  const Event start, stop;
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
  const std::pair<const char*, const Graph*> graphs[] = {
      {"transform", &transform}, {"copy kernel", &copy}, {"cudaMemcpyAsync", &memcpy}};

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

void TransformAndWait(const Problem& problem, const Buffers& buffers) {
  const Stream stream;
  Check(Enqueue(problem, buffers, stream));
  Check(cudaStreamSynchronize(stream));
}

}  // namespace jax_hadacore::cuda
