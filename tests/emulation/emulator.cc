// emulator.cc: runs kernels on the host. The threads of a block, or of a cluster of blocks, are fibers of one thread of
// the host, each running until it waits for others, so a launch does the same every time.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>

#include "device.h"
#include "machine.h"

namespace emulation {

Machine machine;
Block* block;
Thread* current;
uint32_t cluster;
std::string error;

namespace {

Block blocks[kMaxCluster];
jmp_buf scheduler;
uint32_t serial, phase;

}  // namespace

int ThreadNumber() { return static_cast<int>(current - block->threads.data()); }

// Contexts only start threads: switching by jumps is many times as fast, as it leaves signal masks alone.
void Suspend() {
  if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

namespace {

void RunThread() {
  CallKernel();
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
  if (machine.schedule == kReverse) std::reverse(order.begin(), order.end());
  if (machine.schedule >= kShuffled) std::shuffle(order.begin(), order.end(), random);
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
  ForgetKnowledge();
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

}  // namespace

void RunCluster(unsigned first, int size, int count) {
  std::minstd_rand random(static_cast<unsigned>(machine.schedule));
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

}  // namespace emulation
