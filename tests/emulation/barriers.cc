// barriers.cc: what threads wait for, and what they learn by it: a thread knows of what others did before they arrived.
#include <algorithm>
#include <tuple>

#include "device.h"
#include "machine.h"
#include "ptx.cuh"

namespace emulation {
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

// The running thread has arrived, or brought what it will; the turn ends with the last arrival and the last byte.
void EndTurn(SharedBarrier& barrier) {
  LearnFrom(barrier.arrived, *current);
  if (barrier.left > 0 || barrier.bytes > 0) return;
  barrier.left = barrier.arrivals;
  ++barrier.turns;
  Learn(barrier.ended, barrier.arrived);
  barrier.arrived.clear();
}

void ExchangeKnowledge(void* const (&lanes)[kWarp]) {
  std::vector<uint32_t> all;
  for (void* lane : lanes) LearnFrom(all, *static_cast<Thread*>(lane));
  for (void* lane : lanes) static_cast<Thread*>(lane)->known = all;
}
constexpr Collective kSyncWarp = {"__syncwarp", ExchangeKnowledge};

}  // namespace

void ForgetKnowledge() {
  for (auto& [address, barrier] : block->barriers) barrier.ended.clear(), barrier.arrived.clear();
  for (Thread& thread : block->threads) thread.known.clear(), thread.clock = 1;
}

bool WakeAtBarriers() {
  bool any = false;
  for (Thread& thread : block->threads)
    if (thread.state == Thread::kAtSharedBarrier && block->barriers[thread.shared_barrier].turns % 2 != thread.turn) {
      thread.state = Thread::kReady;
      any = true;
    }
  return any;
}

void SyncWarp() { Meet(kSyncWarp, current); }

void MakeBarrier(const void* address, int arrivals) {
  block->barriers[reinterpret_cast<uintptr_t>(address)] = {arrivals, arrivals, 0, 0, {}, {}};
}

void ArriveAt(const void* address) { ArriveAndExpect(address, 0); }

void ArriveAndExpect(const void* address, int bytes) {
  SharedBarrier& barrier = BarrierAt(address);
  --barrier.left;
  barrier.bytes += bytes;
  EndTurn(barrier);
}

void Bring(const void* address, int bytes) {
  SharedBarrier& barrier = BarrierAt(address);
  if ((barrier.bytes -= bytes) < 0) Fail("more bytes are brought than were expected");
  EndTurn(barrier);
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
