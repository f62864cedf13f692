// memory.cc: watches every access to memory. The kernels are compiled with -fsanitize=thread and
// -fsanitize=alignment,bounds,... but the functions that such code calls before each access are the ones at the end of
// this file. They find accesses outside the operands, races within a block and between blocks, and shared memory that
// is read before it is written.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace emulation {

std::vector<Memory> memories;

Memory& SharedMemory() {
  return *std::find_if(memories.begin(), memories.end(), [](const Memory& memory) { return memory.shared; });
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

void CheckComplete(const Memory& memory) {
  for (const Place& place : memory.places)
    if ((memory.read && !place.read.block) || (memory.written && !place.write.block)) {
      error = memory.name + " is not " + (memory.read && !place.read.block ? "read" : "written") + " at byte " +
              std::to_string(static_cast<size_t>(&place - memory.places.data()) * memory.unit);
      return;
    }
}

namespace {

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
}  // namespace emulation

extern "C" {

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
