// calls.cc: what tests/kernels.py calls through ctypes.
#include <algorithm>

#include "cuda/launch.h"
#include "machine.h"

namespace {

using namespace jax_hadacore;
using namespace emulation;

// What launch.cc finds, where the emulated device is asked.
cuda::Gpu GpuOf(const Machine& machine) {
  const bool clusters = machine.clusters != 0, warp_groups = machine.warp_groups != 0;
  return {0, machine.processors, machine.shared_bytes, true, clusters, warp_groups};
}

// Forgets what was before, and notes the kernels that will run.
void Begin(const Machine& chosen, const std::vector<cuda::Launch>& launches) {
  machine = chosen;
  error.clear();
  memories.clear();
  kernel_words.clear();
  for (const cuda::Launch& one : launches) kernel_words[one.kernel.function] = one.kernel.words;
}

// What went wrong, or an empty string; of a scratch that one launch does not need, nothing has to be accessed.
const char* End(cudaError_t status, const void* unneeded = nullptr) {
  if (status != cudaSuccess && error.empty()) error = "invalid configuration";
  for (const Memory& memory : memories)
    if (error.empty() && (!unneeded || memory.begin != reinterpret_cast<uintptr_t>(unneeded))) CheckComplete(memory);
  return error.c_str();
}

}  // namespace

extern "C" {

struct PlannedLaunch {
  int64_t blocks, blocks_per_row, threads, shared_bytes, per_block, runs, run_rows, count, n, stride, words, most_words;
};

// Stores up to `most` launches of a transform of aligned buffers, and returns how many there are.
int emulation_plan(const Problem* problem, const Machine* machine, int inplace, PlannedLaunch* launches, int most) {
  const auto address = [](uintptr_t a) { return reinterpret_cast<void*>(a); };
  const cuda::Buffers buffers = {address(16), address(inplace ? 16 : 32), address(48)};
  int count = 0;
  for (const cuda::Launch& launch : cuda::Plan(*problem, buffers, GpuOf(*machine))) {
    const auto& [kernel, work, blocks, words] = launch;
    if (count < most)
      launches[count] = {blocks,
                         kernel.blocks_per_row,
                         kernel.threads,
                         kernel.shared_bytes,
                         work.per_block,
                         work.runs,
                         work.run_rows,
                         work.count,
                         work.n,
                         work.stride,
                         static_cast<int64_t>(words.size()),
                         kernel.words};
    ++count;
  }
  return count;
}

int emulation_needs_workspace(const Problem* problem) { return cuda::NeedsWorkspace(*problem); }

int emulation_takes_stride(const Problem* problem) { return cuda::TakesStride(*problem); }

// Runs the transform and returns what went wrong, or an empty string.
const char* emulation_run(const Problem* problem, const void* x, void* y, void* workspace, const Machine* machine) {
  constexpr size_t kItemSizes[] = {2, 2, 4, 8};
  const size_t size = kItemSizes[static_cast<int>(problem->dtype)], sum_size = std::max<size_t>(size, 4);
  const size_t count = static_cast<size_t>(problem->rows * problem->n);
  const cuda::Buffers buffers = {x, y, workspace};
  const std::vector<cuda::Launch> launches = cuda::Plan(*problem, buffers, GpuOf(*machine));
  Begin(*machine, launches);
  Watch(Operand("x", x, count * size, true, false, size));
  Watch(Operand("y", y, count * size, false, true, size));
  if (workspace) Watch(Operand("the workspace", workspace, count * sum_size, true, true, sum_size));
  if (problem->signs_on_device) {
    const size_t bytes = static_cast<size_t>(SignWords(problem->n)) * sizeof(uint32_t);
    Watch(Operand("the signs", problem->signs, bytes, true, false, sizeof(uint32_t)));
  }
  const cudaError_t status = cuda::Enqueue(*problem, buffers, nullptr);
  return End(status, launches.size() == 1 ? workspace : nullptr);
}

int emulation_fuses_codes(const Problem* problem, const Quantization* quantization) {
  return cuda::FusesCodes(*problem, *quantization);
}

// The same for a transform whose results become codes.
const char* emulation_run_codes(const Problem* problem, const Quantization* quantization, const void* x,
                                const QuantizedBuffers* results, const Machine* machine) {
  const size_t count = static_cast<size_t>(problem->rows * problem->n);
  const size_t groups = count / static_cast<size_t>(quantization->group);
  const size_t scale_size = quantization->scale == Scale::kFloat32 ? 4 : 1;
  Begin(*machine, {cuda::PlanCodes(*problem, *quantization, x, *results, GpuOf(*machine))});
  Watch(Operand("x", x, count * 2, true, false, 2));
  const size_t bytes = count * static_cast<size_t>(CodeBits(quantization->code)) / 8;
  Watch(Operand("the codes", results->codes, bytes, false, true, 1));
  if (results->scales) Watch(Operand("the scales", results->scales, groups * scale_size, false, true, scale_size));
  if (results->zero_points) Watch(Operand("the zero points", results->zero_points, groups, false, true, 1));
  if (quantization->given) Watch(Operand("the given scale", quantization->given, 4, true, false, 4));
  return End(cuda::EnqueueCodes(*problem, *quantization, x, *results, nullptr));
}
}
