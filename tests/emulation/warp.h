// warp.h: how the lanes of an emulated warp meet.
#pragma once

#include <string>

namespace emulation {

// What a warp does together once all its lanes have come to it, each with an argument of its own.
struct Collective {
  const char* name;
  void (*run)(void* const (&arguments)[32]);
};

// Suspends the calling lane until the others are at the same collective, which has then run. Anything else is an error.
void Meet(const Collective& collective, void* argument);

// Ends the launch with this message.
[[noreturn]] void Fail(const std::string& message);

}  // namespace emulation
