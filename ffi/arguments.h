// arguments.h: reads a Problem from the buffers of an XLA call and checks what protects memory. For *_ffi.cc only.
#pragma once

#include <string>

#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace jax_hadacore {

inline xla::ffi::ErrorOr<Problem> ReadProblem(const xla::ffi::AnyBuffer& x, const xla::ffi::AnyBuffer& y,
                                              double scale) {
  namespace ffi = xla::ffi;
  const auto invalid = [](const std::string& why) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("jax_hadacore: " + why));
  };
  Problem problem{};
  problem.scale = scale;
  switch (x.element_type()) {
    case ffi::F16: problem.dtype = Dtype::kF16; break;
    case ffi::BF16: problem.dtype = Dtype::kBF16; break;
    case ffi::F32: problem.dtype = Dtype::kF32; break;
    case ffi::F64: problem.dtype = Dtype::kF64; break;
    default:
      return invalid("the element type must be f16, bf16, f32 or f64, got XLA type " +
                     std::to_string(static_cast<int>(x.element_type())));
  }
  if (y.element_type() != x.element_type() || y.element_count() != x.element_count())
    return invalid("the result must have the operand's type and size");
  if (x.dimensions().size() == 0) return invalid("the operand must have at least one dimension");
  problem.n = x.dimensions().back();
  if (x.element_count() == 0) return problem;  // rows stays 0
  if ((problem.n & (problem.n - 1)) || problem.n > kMaxLength)
    return invalid("the last dimension must be a power of two up to 2^24, got " + std::to_string(problem.n));
  problem.rows = static_cast<int64_t>(x.element_count()) / problem.n;
  return problem;
}

}  // namespace jax_hadacore
