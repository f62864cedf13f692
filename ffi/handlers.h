// handlers.h: what a Python module registers with XLA.
#pragma once

struct XLA_FFI_Error;
struct XLA_FFI_CallFrame;

// XLA's handlers. Each module defines those of its platform.
extern "C" XLA_FFI_Error* JaxHadacoreHadamardCpu(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* JaxHadacoreHadamardCuda(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* JaxHadacoreQuantizeCpu(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* JaxHadacoreQuantizeCuda(XLA_FFI_CallFrame* call_frame);

namespace jax_hadacore {

// The XLA FFI version, major and minor, of the headers that a module was built with. An older jaxlib refuses it.
extern const int kFfiApiVersion[2];

}  // namespace jax_hadacore
