// module.cc: the Python module jax_hadacore._cuda.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "../handlers.h"
#include "launch.h"

namespace nb = nanobind;
using namespace jax_hadacore;

NB_MODULE(_cuda, m) {
  m.attr("ffi_api_version") = nb::make_tuple(kFfiApiVersion[0], kFfiApiVersion[1]);
  m.attr("toolkit") = CUDART_VERSION;
  m.def("hadamard_handler", [] { return nb::capsule(reinterpret_cast<void*>(JaxHadacoreHadamardCuda)); });
  m.def("driver_problem", cuda::DriverProblem, "Why the kernels cannot run with this driver, or ''.");
  m.def("device_problem", cuda::DeviceProblem, "Why the kernels cannot run on the current GPU, or ''.");
}
