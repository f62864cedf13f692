// machine.h: the emulated machine. emulator.cc runs its threads, barriers.cc has what they wait for, memory.cc watches
// what they access, launches.cc starts kernels.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "warp.h"

namespace emulation {

constexpr int kWarp = 32, kMaxThreads = 1024, kMaxCluster = 2;
constexpr size_t kStack = 128 * 1024, kMaxShared = 227 * 1024;

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
  int bytes;       // that are to be brought in this turn
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
  // In this phase, of places that several read, where there are barriers:
  std::map<uintptr_t, std::vector<Access>> readers;
};

// What a test chooses.
struct Machine {
  int processors, shared_bytes, clusters, warp_groups, schedule;
};

extern Machine machine;
extern Block* block;     // the one that runs
extern Thread* current;  // null between threads
extern uint32_t launch, cluster;
extern bool overlap;  // the running launch may have begun before the one before ended
extern std::string error;
extern std::vector<Memory> memories;
extern std::map<const void*, int> kernel_words;  // how many the kernels that run take

int ThreadNumber();

// Makes a thread wait, in the state that it has been given.
void Suspend();

// Runs `size` blocks of `count` threads side by side, from `first` on; each thread calls the kernel.
void RunCluster(unsigned first, int size, int count);
void CallKernel();

// In a new phase nothing is known of the one before.
void ForgetKnowledge();

// Lets those go on that wait for turns which have ended, and says whether there are any.
bool WakeAtBarriers();

// Adds to what is watched; an operand is `unit` bytes wide.
void Watch(const Memory& memory);
Memory Operand(const char* name, const void* begin, size_t bytes, bool read, bool written, size_t unit);
Memory Shared(const void* begin, size_t bytes);
Memory& SharedMemory();

// That no access is missing, neither in a kernel nor among those that it is compiled to report.
void CheckComplete(const Memory& memory);

}  // namespace emulation
