// module.cc: the Python module jax_hadacore._cpu.
#include <nanobind/nanobind.h>

#include "../handlers.h"
#include "hadamard.h"

namespace nb = nanobind;
using namespace jax_hadacore;

NB_MODULE(_cpu, m) {
  m.attr("ffi_api_version") = nb::make_tuple(kFfiApiVersion[0], kFfiApiVersion[1]);
  m.def("hadamard_handler", [] { return nb::capsule(reinterpret_cast<void*>(JaxHadacoreHadamardCpu)); });
  m.def("isa", [] { return cpu::CurrentIsa().name; }, "The instruction set in use.");
  m.def("select_isa", cpu::SelectIsa, nb::arg("name"),
        "Uses another instruction set, for tests; False when this build or this processor has none of that name.");
}
