// emulator.cc: launches kernels on the host, and watches every access to memory. The threads of a block, or of a
// cluster of blocks, are fibers of one thread of the host, each running until it waits for others, so a launch does the
// same every time.
//
// The kernels are compiled with -fsanitize=thread and -fsanitize=alignment,bounds,... but the functions that such code
// calls before each access are the ones at the end of this file. They find accesses outside the operands, races within
// a block and between blocks, and shared memory that is read before it is written.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "device.h"
#include "warp.h"
#undef blockDim  // is a member of cudaLaunchConfig_t here

namespace emulation {
namespace {

using jax_hadacore::cuda::Work;

constexpr int kWarp = 32, kMaxThreads = 1024, kMaxCluster = 2;
constexpr size_t kStack = 128 * 1024, kMaxShared = 227 * 1024;

}  // namespace
}  // namespace emulation

// The kernels' shared memory, by the name that they give it.
namespace jax_hadacore::cuda {
alignas(128) float4 shared_memory[emulation::kMaxShared / sizeof(float4)];
}  // namespace jax_hadacore::cuda

namespace emulation {
namespace {

// The order in which a cluster's blocks run, and a block's warps, each as far as it gets alone, and in which a warp's
// lanes do.
enum Schedule { kForward, kReverse, kShuffled };

struct Thread {
  enum { kReady, kMeeting, kAtBarrier, kAtSharedBarrier, kAtCluster, kDone } state;
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  bool started;
  jmp_buf place;  // where it waits
  const Collective* collective;
  void* argument;
  bool waited;        // for the launch before
  uint32_t meetings;  // of the blocks of the cluster that it has waited for
  bool arrived;       // at the next
  std::deque<std::pair<void*, const void*>> copies;
  uintptr_t shared_barrier;  // at which it waits for the end of a turn
  uint32_t turn;             // modulo 2
  // What put others' accesses before its own in this phase: up to which of their clocks. Its own clock goes on where
  // others may learn what it did.
  std::vector<uint32_t> known;
  uint32_t clock;
};

// A barrier in shared memory, and what those have known who arrived in the turns that have ended, and in this one.
struct SharedBarrier {
  int arrivals, left;
  uint32_t turns;  // that have ended
  std::vector<uint32_t> ended, arrived;
};

// Who accessed a place last. Serial numbers count through a whole run: a phase lasts from one barrier to the next, and
// `meetings` counts those of a cluster's blocks that came before the access.
struct Access {
  uint32_t launch = 0, cluster = 0, meetings = 0, block = 0, phase = 0, thread = 0, clock = 0;
};
constexpr uint32_t kSeveral = UINT32_MAX;

// The accesses to a piece of memory, of as many bytes as the smallest access to it.
struct Place {
  Access write, read;
};

struct Memory {
  std::string name;
  uintptr_t begin, end;
  bool read, written;  // what has to be done to all of it; it may be written only where it has to be
  bool shared;
  size_t unit;
  std::vector<Place> places;
};

// A block of the running cluster, and its shared memory while another block has the name.
struct Block {
  unsigned index;
  uint32_t serial, phase;
  std::vector<Thread> threads;
  std::vector<char> shared;
  std::vector<Place> places;
  std::map<uintptr_t, SharedBarrier> barriers;
  std::map<uintptr_t, std::vector<Access>>
      readers;  // in this phase of places that several read, where there are barriers
};

Block blocks[kMaxCluster];
Block* block;  // the one that runs
jmp_buf scheduler;
Thread* current;
const void* kernel;
int words;  // that it takes
const void* argument;
uint32_t launch, serial, phase, cluster;
std::vector<Memory> memories;
std::map<const void*, int> shared_limits;
int processors, shared_bytes;
bool clusters, warp_groups;
int schedule;
bool overlap;  // the running launch may have begun before the one before ended
std::string error;

int ThreadNumber() { return static_cast<int>(current - block->threads.data()); }

// Contexts only start threads: switching by jumps is many times as fast, as it leaves signal masks alone.
void Suspend() {
  if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

template <typename Argument>
void Call() {
  reinterpret_cast<void (*)(Argument)>(const_cast<void*>(kernel))(*static_cast<const Argument*>(argument));
}

// A kernel that takes kWords words, or half as many, ...
template <int kWords>
void CallSigned() {
  if (words == kWords) Call<jax_hadacore::cuda::WorkAndWords<kWords>>();
  if constexpr (kWords > 1) CallSigned<kWords / 2>();
}

void RunThread() {
  using namespace jax_hadacore::cuda;
  if (words == 0) Call<Work>();
  if (words == kFewWords) Call<WorkAndWords<kFewWords>>();
  if (words == kManyWords) Call<WorkAndWords<kManyWords>>();
  CallSigned<kOnePass / 32>();
  if (!current->copies.empty()) Fail("returns before its copies are finished");
  current->state = Thread::kDone;
  Suspend();
}

void Resume(Thread& thread) {
  current = &thread;
  if (!_setjmp(scheduler)) {
    if (thread.started) _longjmp(thread.place, 1);
    thread.started = true;
    setcontext(&thread.start);
  }
  current = nullptr;
}

std::vector<int> Order(int count, std::minstd_rand& random) {
  std::vector<int> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  if (schedule == kReverse) std::reverse(order.begin(), order.end());
  if (schedule >= kShuffled) std::shuffle(order.begin(), order.end(), random);
  return order;
}

bool AllMeet(const Thread* lanes) {
  return std::all_of(lanes, lanes + kWarp, [&](const Thread& lane) {
    return lane.state == Thread::kMeeting && lane.collective == lanes->collective;
  });
}

// Runs a warp until none of its lanes can go on without other warps.
void RunWarp(Thread* lanes, std::minstd_rand& random) {
  const std::vector<int> order = Order(kWarp, random);
  while (true) {
    for (const int lane : order) {
      if (lanes[lane].state == Thread::kReady) Resume(lanes[lane]);
      if (!error.empty()) return;
    }
    if (!AllMeet(lanes)) return;
    void* arguments[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) {
      arguments[lane] = lanes[lane].argument;
      lanes[lane].state = Thread::kReady;
    }
    lanes->collective->run(arguments);
  }
}

std::string Describe(const Thread& thread) {
  switch (thread.state) {
    case Thread::kDone: return "has returned";
    case Thread::kAtBarrier: return "is at __syncthreads";
    case Thread::kAtSharedBarrier: return "waits at a barrier in shared memory";
    case Thread::kAtCluster: return "waits for its cluster";
    case Thread::kMeeting: return std::string("is at ") + thread.collective->name;
    case Thread::kReady: break;
  }
  return "can run";
}

bool All(int state) {
  return std::all_of(block->threads.begin(), block->threads.end(),
                     [&](const Thread& thread) { return thread.state == state; });
}

Memory& SharedMemory() {
  return *std::find_if(memories.begin(), memories.end(), [](const Memory& memory) { return memory.shared; });
}

// How many words a kernel takes.
int WordsOf(const void* function) {
  using namespace jax_hadacore::cuda;
  static const std::map<const void*, int> all = [] {
    std::map<const void*, int> words;
    const auto add = [&](const Kernel& kernel) { words[kernel.function] = kernel.words; };
    for (const int count : {kFewWords, kManyWords})
      for (const int bits : {1, 2, 3, 4, 5})
        add(OrderRowsKernel<F16>(bits, count - 1)), add(OrderRowsKernel<BF16>(bits, count - 1));
    for (const int columns : {4, 8, 16}) add(OrderRingKernel<F16>(columns)), add(OrderRingKernel<BF16>(columns));
    for (const int eights : {3, 5, 6})
      add(PairRingKernel<F16>(eights == 3 ? 8 : 4, eights)), add(PairRingKernel<BF16>(eights == 3 ? 8 : 4, eights));
    for (const int width : {1, 2, 4, 8})
      for (const bool two_orders : {false, true})
        add(GroupRowsKernel<F16>(width, two_orders)), add(GroupRowsKernel<BF16>(width, two_orders));
    for (int bits = 0; bits <= kMostFloatBits; ++bits) add(OrderFloatsKernel(bits));
    for (const bool values : {false, true}) {
      add(FactorKernel<F16, float>(1, values));
      add(FactorKernel<BF16, float>(1, values));
      add(FactorKernel<float, float>(1, values));
      add(FactorKernel<double, double>(1, values));
    }
    for (int bits = 0; kOnePass >> bits > 0; ++bits)
      for (const RowsKernels& kernels : {FindRowsKernels<F16, F16>(bits, true), FindRowsKernels<BF16, BF16>(bits, true),
                                         FindRowsKernels<float, float>(bits, true)})
        add(kernels.signed_rows), add(kernels.signed_rows_anywhere);
    for (const Kernel& kernel : {SignsKernel<uint16_t>(), SignsKernel<float>(), SignsKernel<double>()}) add(kernel);
    return words;
  }();
  const auto found = all.find(function);
  return found == all.end() ? 0 : found->second;
}

// Makes a block the one that runs.
void Enter(Block& next) {
  if (block == &next) return;
  Memory& memory = SharedMemory();
  char* const shared = reinterpret_cast<char*>(memory.begin);
  if (block) {
    block->shared.assign(shared, shared + (memory.end - memory.begin));
    block->places = memory.places;
  }
  block = &next;
  std::copy(block->shared.begin(), block->shared.end(), shared);
  memory.places = block->places;
}

void Start(Block& next, unsigned index, int count) {
  next.index = index;
  next.serial = ++serial;
  // Where shared memory was not written it holds NaN, should a read of it go unnoticed.
  next.shared.assign(SharedMemory().end - SharedMemory().begin, static_cast<char>(0xff));
  next.places.assign(SharedMemory().places.size(), Place{});
  next.barriers.clear();
  next.threads.resize(static_cast<size_t>(count));
  for (Thread& thread : next.threads) {
    thread.state = Thread::kReady;
    if (!thread.stack) thread.stack = std::make_unique<char[]>(kStack);
    thread.started = false;
    thread.waited = !overlap;
    thread.meetings = 0;
    thread.arrived = false;
    thread.copies.clear();
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack.get();
    thread.start.uc_stack.ss_size = kStack;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, RunThread, 0);
  }
}

void BeginPhase() {
  block->phase = ++phase;
  block->readers.clear();
  for (auto& [address, barrier] : block->barriers) barrier.ended.clear(), barrier.arrived.clear();
  for (Thread& thread : block->threads) thread.known.clear(), thread.clock = 1;
}

// Lets those go on that wait for turns which have ended, and says whether there are any.
bool WakeAtBarriers() {
  bool any = false;
  for (Thread& thread : block->threads)
    if (thread.state == Thread::kAtSharedBarrier && block->barriers[thread.shared_barrier].turns % 2 != thread.turn) {
      thread.state = Thread::kReady;
      any = true;
    }
  return any;
}

// Runs a block until it is done or waits for its cluster.
void RunBlock(std::minstd_rand& random) {
  while (true) {
    BeginPhase();
    do
      for (const int warp : Order(static_cast<int>(block->threads.size()) / kWarp, random)) {
        RunWarp(&block->threads[static_cast<size_t>(warp * kWarp)], random);
        if (!error.empty()) return;
      }
    while (WakeAtBarriers());
    if (All(Thread::kDone) || All(Thread::kAtCluster)) return;
    if (!All(Thread::kAtBarrier)) break;
    for (Thread& thread : block->threads) thread.state = Thread::kReady;
  }
  size_t other = 0;
  while (other + 1 < block->threads.size() && Describe(block->threads[other]) == Describe(block->threads[0])) ++other;
  error = "block " + std::to_string(block->index) + " is stuck: thread 0 " + Describe(block->threads[0]) + ", thread " +
          std::to_string(other) + " " + Describe(block->threads[other]);
}

// Runs `size` blocks side by side, from `first` on.
void RunCluster(unsigned first, int size, int count) {
  std::minstd_rand random(static_cast<unsigned>(schedule));
  ++cluster;
  block = nullptr;
  for (int i = 0; i < size; ++i) Start(blocks[i], first + static_cast<unsigned>(i), count);
  while (true) {
    int done = 0;
    for (const int i : Order(size, random)) {
      Enter(blocks[i]);
      RunBlock(random);
      if (!error.empty()) return;
      done += All(Thread::kDone);
    }
    if (done == size) return;
    if (done > 0) {
      error = "block " + std::to_string(block->index) + " or its neighbour has returned, and the other waits for it";
      return;
    }
    for (int i = 0; i < size; ++i)
      for (Thread& thread : blocks[i].threads) {
        thread.state = Thread::kReady;
        thread.arrived = false;
        ++thread.meetings;
      }
  }
}

void Watch(const Memory& memory) {
  for (Memory& other : memories)
    if (other.begin == memory.begin && memory.begin != memory.end) {  // in place
      other.written |= memory.written;
      return;
    }
  memories.push_back(memory);
  memories.back().places.resize((memory.end - memory.begin) / memory.unit);
}

Memory Operand(const char* name, const void* begin, size_t bytes, bool read, bool written, size_t unit) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  return {name, address, address + bytes, read, written, false, unit, {}};
}

Memory Shared(const void* begin, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  return {"shared memory", address, address + bytes, true, true, true, sizeof(uint16_t), {}};
}

// That no access is missing, neither in a kernel nor among those that it is compiled to report.
void CheckComplete(const Memory& memory) {
  for (const Place& place : memory.places)
    if ((memory.read && !place.read.block) || (memory.written && !place.write.block)) {
      error = memory.name + " is not " + (memory.read && !place.read.block ? "read" : "written") + " at byte " +
              std::to_string(static_cast<size_t>(&place - memory.places.data()) * memory.unit);
      return;
    }
}

[[noreturn]] void FailAt(const Memory& memory, uintptr_t address, bool write, const std::string& why) {
  Fail((write ? "write to " : "read of ") + memory.name + " at byte " +
       std::to_string(static_cast<int64_t>(address - memory.begin)) + " " + why);
}

// Whether the running thread knows of an access in its phase to this address, or of all that there were.
bool Knows(uintptr_t address, const Access& access) {
  if (access.thread == static_cast<uint32_t>(ThreadNumber())) return true;
  if (access.thread != kSeveral)
    return access.thread < current->known.size() && current->known[access.thread] >= access.clock;
  const auto found = block->readers.find(address);
  return found != block->readers.end() && std::all_of(found->second.begin(), found->second.end(),
                                                      [&](const Access& reader) { return Knows(address, reader); });
}

// Whether two threads of the running launch access the same place, and nothing puts one access before the other.
bool Races(const Memory& memory, uintptr_t address, const Access& before, const Access& now) {
  if (before.block == now.block && before.phase == now.phase && Knows(address, before)) return false;
  if (memory.shared) return before.block == now.block && before.phase == now.phase;
  if (before.launch != now.launch || (before.cluster == now.cluster && before.meetings < now.meetings)) return false;
  return before.block != now.block || before.phase == now.phase;
}

void OnAccess(const void* to, size_t bytes, bool write) {
  if (!current) return;
  const auto address = reinterpret_cast<uintptr_t>(to), end = address + bytes;
  const auto stack = reinterpret_cast<uintptr_t>(current->stack.get());
  if (address >= stack && end <= stack + kStack) return;

  const auto found = std::find_if(memories.begin(), memories.end(),
                                  [&](const Memory& memory) { return address >= memory.begin && end <= memory.end; });
  if (found == memories.end()) {
    const Memory* nearest = nullptr;
    for (const Memory& memory : memories)
      if (!nearest || std::min(address - memory.begin, memory.begin - address) <
                          std::min(address - nearest->begin, nearest->begin - address))
        nearest = &memory;
    FailAt(*nearest, address, write, "is outside its " + std::to_string(nearest->end - nearest->begin) + " bytes");
  }
  if (write && !found->written) FailAt(*found, address, write, "which is only read");
  if (!found->shared && !current->waited) FailAt(*found, address, write, "before the launch before has ended");

  // What comes after a thread's arrival may be late: for reads it counts as after the meeting, for writes as before.
  const uint32_t meetings = current->meetings + (current->arrived && !write);
  const Access now = {
      launch, cluster, meetings, block->serial, block->phase, static_cast<uint32_t>(ThreadNumber()), current->clock};
  for (size_t i = (address - found->begin) / found->unit; i * found->unit < end - found->begin; ++i) {
    Place& place = found->places[i];
    const uintptr_t at = found->begin + i * found->unit;
    if (found->shared && !write && !place.write.block) FailAt(*found, address, write, "before it is written");
    if (Races(*found, at, place.write, now) || (write && Races(*found, at, place.read, now))) {
      const bool with_write = Races(*found, at, place.write, now);
      const uint32_t other = with_write ? place.write.thread : place.read.thread;
      FailAt(*found, address, write,
             std::string("races with a ") + (with_write ? "write" : "read") + " by thread " +
                 (other == kSeveral ? "?" : std::to_string(other)));
    }
    if (write) {
      place.write = now;
      if (found->shared && block->readers.erase(at)) place.read = {};  // all of them before it
    } else {
      // Of several threads that read in the same phase, or several blocks, no write may follow by any one of them.
      Access read = now;
      if (Races(*found, at, place.read, now)) {
        if (place.read.block == now.block && !block->barriers.empty()) {
          std::vector<Access>& readers = block->readers[at];
          if (place.read.thread != kSeveral) readers = {place.read};
          readers.push_back(now);
        }
        read.thread = kSeveral;
      }
      if (!found->shared && place.read.launch == launch && place.read.block != now.block) {
        read.block = kSeveral;
        if (place.read.cluster != cluster) read.cluster = kSeveral;
        read.meetings = std::max(read.meetings, place.read.meetings);
      }
      place.read = read;
    }
  }
}

}  // namespace

Index BlockSize() { return {static_cast<unsigned>(block->threads.size())}; }
Index ThreadIndex() { return {static_cast<unsigned>(ThreadNumber())}; }
Index BlockIndex() { return {block->index}; }

void Meet(const Collective& collective, void* argument) {
  current->state = Thread::kMeeting;
  current->collective = &collective;
  current->argument = argument;
  Suspend();
}

void Fail(const std::string& message) {
  if (!current) throw std::logic_error(message);
  error = "block " + std::to_string(block->index) + " thread " + std::to_string(ThreadNumber()) + ": " + message;
  while (true) Suspend();
}

void WaitForPreviousLaunch() { current->waited = true; }

void ArriveAtCluster() {
  if (current->arrived) Fail("arrives at its cluster twice");
  current->arrived = true;
}

void WaitForCluster() {
  if (!current->arrived) Fail("waits for its cluster before it arrives");
  current->state = Thread::kAtCluster;
  Suspend();
}

namespace {

void Learn(std::vector<uint32_t>& known, const std::vector<uint32_t>& more) {
  known.resize(std::max(known.size(), more.size()));
  for (size_t i = 0; i < more.size(); ++i) known[i] = std::max(known[i], more[i]);
}

// Adds what a thread knows, and has done so far.
void LearnFrom(std::vector<uint32_t>& known, Thread& thread) {
  Learn(known, thread.known);
  const auto number = static_cast<size_t>(&thread - block->threads.data());
  known.resize(std::max(known.size(), number + 1));
  known[number] = thread.clock++;
}

SharedBarrier& BarrierAt(const void* address) {
  const auto found = block->barriers.find(reinterpret_cast<uintptr_t>(address));
  if (found == block->barriers.end()) Fail("there is no barrier");
  return found->second;
}

void ExchangeKnowledge(void* const (&lanes)[kWarp]) {
  std::vector<uint32_t> all;
  for (void* lane : lanes) LearnFrom(all, *static_cast<Thread*>(lane));
  for (void* lane : lanes) static_cast<Thread*>(lane)->known = all;
}
constexpr Collective kSyncWarp = {"__syncwarp", ExchangeKnowledge};

}  // namespace

void SyncWarp() { Meet(kSyncWarp, current); }

void MakeBarrier(const void* address, int arrivals) {
  block->barriers[reinterpret_cast<uintptr_t>(address)] = {arrivals, arrivals, 0, {}, {}};
}

void ArriveAt(const void* address) {
  SharedBarrier& barrier = BarrierAt(address);
  LearnFrom(barrier.arrived, *current);
  if (--barrier.left > 0) return;
  barrier.left = barrier.arrivals;
  ++barrier.turns;
  Learn(barrier.ended, barrier.arrived);
  barrier.arrived.clear();
}

void WaitAt(const void* address, int turn) {
  const SharedBarrier& barrier = BarrierAt(address);
  current->shared_barrier = reinterpret_cast<uintptr_t>(address);
  current->turn = static_cast<uint32_t>(turn);
  if (barrier.turns % 2 == current->turn) {
    current->state = Thread::kAtSharedBarrier;
    Suspend();
  }
  Learn(current->known, barrier.ended);
}

void StartCopy(void* to, const void* from) { current->copies.emplace_back(to, from); }

bool NextCopy(void*& to, const void*& from) {
  if (current->copies.empty()) return false;
  std::tie(to, from) = current->copies.front();
  current->copies.pop_front();
  return true;
}

}  // namespace emulation

void __syncthreads() {
  using namespace emulation;
  current->state = Thread::kAtBarrier;
  Suspend();
}

// What the device's code can do is asked once: one that has warp groups is another device.
cudaError_t cudaGetDevice(int* device) {
  *device = emulation::warp_groups;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = emulation::processors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulation::shared_bytes; break;
    case cudaDevAttrClusterLaunch: *value = emulation::clusters; break;
  }
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 90;
  attributes->numRegs = emulation::warp_groups ? 128 : 4;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
  emulation::shared_limits[function] = value;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t) { return emulation::error.c_str(); }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  using namespace emulation;
  const unsigned grid = config->gridDim.x, count = config->blockDim.x;
  const size_t bytes = config->dynamicSmemBytes;
  const auto limit = shared_limits.find(function);
  unsigned size = 1;  // of a cluster
  overlap = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) size = attribute.val.clusterDim.x;
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      overlap = attribute.val.programmaticStreamSerializationAllowed;
  }
  if (grid == 0 || grid > INT32_MAX || size > (clusters ? kMaxCluster : 1) || grid % size || count == 0 ||
      count > kMaxThreads || count % kWarp ||
      bytes > (limit == shared_limits.end() ? 48u * 1024 : static_cast<size_t>(limit->second)) ||
      bytes > static_cast<size_t>(shared_bytes)) {
    error = "launch of " + std::to_string(grid) + " blocks, " + std::to_string(size) + " to a cluster, of " +
            std::to_string(count) + " threads and " + std::to_string(bytes) + " bytes of shared memory";
    return cudaErrorInvalidConfiguration;
  }
  kernel = function;
  words = WordsOf(function);
  argument = arguments[0];
  ++launch;
  Watch(Shared(jax_hadacore::cuda::shared_memory, bytes));
  for (unsigned first = 0; first < grid && error.empty(); first += size)
    RunCluster(first, static_cast<int>(size), static_cast<int>(count));
  memories.erase(std::remove_if(memories.begin(), memories.end(), [](const Memory& memory) { return memory.shared; }),
                 memories.end());
  return error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

// What tests/kernels.py calls through ctypes.
extern "C" {

struct PlannedLaunch {
  int64_t blocks, blocks_per_row, threads, shared_bytes, per_block, runs, run_rows, count, n, stride, words, most_words;
};

// Stores up to `most` launches of a transform of aligned buffers, and returns how many there are.
int emulation_plan(const jax_hadacore::Problem* problem, int processors, int shared_bytes, int clusters,
                   int warp_groups, int inplace, PlannedLaunch* launches, int most) {
  using namespace jax_hadacore;
  const auto address = [](uintptr_t a) { return reinterpret_cast<void*>(a); };
  const cuda::Buffers buffers = {address(16), address(inplace ? 16 : 32), address(48)};
  int count = 0;
  for (const cuda::Launch& launch :
       cuda::Plan(*problem, buffers, {0, processors, shared_bytes, clusters != 0, clusters != 0, warp_groups != 0})) {
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

int emulation_needs_workspace(const jax_hadacore::Problem* problem) {
  return jax_hadacore::cuda::NeedsWorkspace(*problem);
}

struct Machine {
  int processors, shared_bytes, clusters, warp_groups, schedule;
};

// Forgets what was before.
static void Begin(const Machine& machine) {
  emulation::error.clear();
  emulation::memories.clear();
  emulation::processors = machine.processors;
  emulation::shared_bytes = machine.shared_bytes;
  emulation::clusters = machine.clusters != 0;
  emulation::warp_groups = machine.warp_groups != 0;
  emulation::schedule = machine.schedule;
}

// Runs the transform and returns what went wrong, or an empty string.
const char* emulation_run(const jax_hadacore::Problem* problem, const void* x, void* y, void* workspace,
                          const Machine* machine) {
  using namespace jax_hadacore;
  constexpr size_t kItemSizes[] = {2, 2, 4, 8};
  const size_t size = kItemSizes[static_cast<int>(problem->dtype)], sum_size = std::max<size_t>(size, 4);
  const size_t count = static_cast<size_t>(problem->rows * problem->n);
  Begin(*machine);
  emulation::Watch(emulation::Operand("x", x, count * size, true, false, size));
  emulation::Watch(emulation::Operand("y", y, count * size, false, true, size));
  if (workspace)
    emulation::Watch(emulation::Operand("the workspace", workspace, count * sum_size, true, true, sum_size));
  if (problem->signs_on_device) {
    const size_t bytes = static_cast<size_t>(SignWords(problem->n)) * sizeof(uint32_t);
    emulation::Watch(emulation::Operand("the signs", problem->signs, bytes, true, false, sizeof(uint32_t)));
  }
  const uint32_t before = emulation::launch;
  const cudaError_t status = cuda::Enqueue(*problem, {x, y, workspace}, nullptr);
  if (status != cudaSuccess && emulation::error.empty()) emulation::error = "invalid configuration";
  const uint32_t launches = emulation::launch - before;
  for (const emulation::Memory& memory : emulation::memories)
    if (emulation::error.empty() && (launches > 1 || memory.begin != reinterpret_cast<uintptr_t>(workspace)))
      CheckComplete(memory);
  return emulation::error.c_str();
}

int emulation_fuses_codes(const jax_hadacore::Problem* problem, const jax_hadacore::Quantization* quantization) {
  return jax_hadacore::cuda::FusesCodes(*problem, *quantization);
}

// The same for a transform whose results become codes.
const char* emulation_run_codes(const jax_hadacore::Problem* problem, const jax_hadacore::Quantization* quantization,
                                const void* x, const jax_hadacore::QuantizedBuffers* results, const Machine* machine) {
  using namespace jax_hadacore;
  const size_t count = static_cast<size_t>(problem->rows * problem->n);
  const size_t groups = count / static_cast<size_t>(quantization->group);
  const size_t scale_size = quantization->scale == Scale::kFloat32 ? 4 : 1;
  Begin(*machine);
  emulation::Watch(emulation::Operand("x", x, count * 2, true, false, 2));
  const size_t bytes = count * static_cast<size_t>(CodeBits(quantization->code)) / 8;
  emulation::Watch(emulation::Operand("the codes", results->codes, bytes, false, true, 1));
  if (results->scales)
    emulation::Watch(emulation::Operand("the scales", results->scales, groups * scale_size, false, true, scale_size));
  if (results->zero_points)
    emulation::Watch(emulation::Operand("the zero points", results->zero_points, groups, false, true, 1));
  if (quantization->given)
    emulation::Watch(emulation::Operand("the given scale", quantization->given, 4, true, false, 4));
  const cudaError_t status = cuda::EnqueueCodes(*problem, *quantization, x, *results, nullptr);
  if (status != cudaSuccess && emulation::error.empty()) emulation::error = "invalid configuration";
  for (const emulation::Memory& memory : emulation::memories)
    if (emulation::error.empty()) CheckComplete(memory);
  return emulation::error.c_str();
}

// What code compiled with -fsanitize=thread calls. It never includes the host's own threads.
#define ACCESSES(size)                                                                 \
  void __tsan_read##size(void* address) { emulation::OnAccess(address, size, false); } \
  void __tsan_write##size(void* address) { emulation::OnAccess(address, size, true); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
#undef ACCESSES
void __tsan_read_range(void* address, size_t bytes) { emulation::OnAccess(address, bytes, false); }
void __tsan_write_range(void* address, size_t bytes) { emulation::OnAccess(address, bytes, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// And with -fsanitize=undefined; the arguments, which differ, begin with a source location.
#define UNDEFINED(what)                                                                                 \
  void __ubsan_handle_##what(const char* const* file) {                                                 \
    uint32_t line;                                                                                      \
    std::memcpy(&line, file + 1, sizeof line);                                                          \
    emulation::Fail(std::string(*file) + ":" + std::to_string(line) + ": undefined behaviour: " #what); \
  }
UNDEFINED(type_mismatch_v1)
UNDEFINED(out_of_bounds)
UNDEFINED(shift_out_of_bounds)
UNDEFINED(add_overflow)
UNDEFINED(sub_overflow)
UNDEFINED(mul_overflow)
UNDEFINED(negate_overflow)
UNDEFINED(divrem_overflow)
UNDEFINED(pointer_overflow)
#undef UNDEFINED
}
