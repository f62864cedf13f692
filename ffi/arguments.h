// arguments.h: reads a Problem from the buffers and attributes of an XLA call and checks what protects memory. For
// *_ffi.cc only.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace jax_hadacore {

// The attributes of a call: `scale` (float64); and where they are needed
//   n (int64)               the length of the transforms that the last dimension consists of; by default all of it
//   orders (int64[])        the orders of the factors that are no powers of two, at most two of them
//   factors (uint32[])      their packed signs, one factor after the other
//   matrix (float64[])      in place of these, the entries of a single factor
//   signs (uint32[])        packed signs of n elements; an operand of that type in place of it
//   signs_last (bool)       apply the signs after the transform
//   behind (int64)          of the dimensions before the last, as many as lie behind it in memory; for CUDA's transform
class ProblemReader {
 public:
  ProblemReader(const xla::ffi::AnyBuffer& x, const xla::ffi::RemainingArgs& more,
                const xla::ffi::Dictionary& attributes)
      : x_(x), more_(more), attributes_(attributes) {}

  // Of a call whose result is y.
  xla::ffi::ErrorOr<Problem> Read(const xla::ffi::AnyBuffer& y) {
    Problem problem{};
    if (ReadProblem(problem) && IsOfRows(problem) && CheckResult(y)) return problem;
    return Error();
  }

  // The same where the last dimension may have others behind it.
  xla::ffi::ErrorOr<Problem> ReadStrided(const xla::ffi::AnyBuffer& y) {
    Problem problem{};
    if (ReadProblem(problem) && CheckResult(y)) return problem;
    return Error();
  }

 protected:
  using Buffer = xla::ffi::AnyBuffer;

  bool ReadProblem(Problem& problem) {
    return ReadOperands(problem) && ReadFactors(problem) && ReadSigns(problem) && ReadStride(problem);
  }
  bool IsOfRows(const Problem& problem) {
    return problem.stride == 1 || Fail("only CUDA's transform takes a dimension with others behind it, got one with " +
                                       std::to_string(problem.stride) + " elements behind it");
  }

  bool Fail(std::string why) {
    why_ = std::move(why);
    return false;
  }
  xla::ffi::Unexpected<xla::ffi::Error> Error() const {
    return xla::ffi::Unexpected(xla::ffi::Error::InvalidArgument("jax_hadacore: " + why_));
  }

  // False where an attribute that is there is of another type.
  template <typename T>
  bool Attribute(const char* name, T& value) {
    if (!attributes_.contains(name)) return true;
    const auto found = attributes_.get<T>(name);
    if (!found.has_value()) return Fail(std::string("the attribute ") + name + " has another type than this version's");
    value = *found;
    return true;
  }

  static std::string Name(xla::ffi::DataType type) { return "XLA type " + std::to_string(static_cast<int>(type)); }

  const Buffer& x_;
  std::optional<Buffer> given_;  // the operand of type f32 after x, which calls that quantise may have

 private:
  template <typename T>
  using Span = xla::ffi::Span<const T>;

  bool ReadOperands(Problem& problem) {
    namespace ffi = xla::ffi;
    switch (x_.element_type()) {
      case ffi::F16: problem.dtype = Dtype::kF16; break;
      case ffi::BF16: problem.dtype = Dtype::kBF16; break;
      case ffi::F32: problem.dtype = Dtype::kF32; break;
      case ffi::F64: problem.dtype = Dtype::kF64; break;
      default: return Fail("the element type must be f16, bf16, f32 or f64, got " + Name(x_.element_type()));
    }
    // Told apart by their types.
    for (size_t i = 0; i < more_.size(); ++i) {
      const auto operand = more_.get<Buffer>(i);
      if (operand.has_error()) return Fail("an operand is no array");
      const ffi::DataType type = operand->element_type();
      if (type != ffi::U32 && type != ffi::F32)
        return Fail("an operand after x must be signs, of type u32, or a scale, of type f32, got " + Name(type));
      std::optional<Buffer>& found = type == ffi::U32 ? signs_ : given_;
      if (found) return Fail("there may be one operand of each type after x, got two of " + Name(type));
      found = *operand;
    }
    if (x_.dimensions().size() == 0) return Fail("the operand must have at least one dimension");
    if (!attributes_.contains("scale")) return Fail("the attribute scale is missing");
    const int64_t last = x_.dimensions().back();
    problem.n = last;
    if (!Attribute("scale", problem.scale) || !Attribute("n", problem.n)) return false;
    if (problem.n < 0 || (problem.n == 0 && last != 0) || (problem.n > 0 && last % problem.n != 0))
      return Fail("the last dimension, " + std::to_string(last) +
                  ", must be a multiple of n = " + std::to_string(problem.n));
    problem.rows = x_.element_count() == 0 ? 0 : static_cast<int64_t>(x_.element_count()) / problem.n;
    return true;
  }

  bool ReadFactors(Problem& problem) {
    Span<int64_t> orders;
    Span<uint32_t> signs;
    Span<double> values;
    if (!Attribute("orders", orders) || !Attribute("factors", signs) || !Attribute("matrix", values)) return false;
    constexpr size_t kFactors = sizeof problem.factors / sizeof *problem.factors;
    if (orders.size() > (values.size() ? 1 : kFactors))
      return Fail("there may be two orders, or one with a matrix, got " + std::to_string(orders.size()));
    size_t used = 0;
    int64_t power = problem.n;
    for (const int64_t order : orders) {
      if (order < 1 || order > kMaxOrder) return Fail("an order must be from 1 to 1024, got " + std::to_string(order));
      Factor& factor = problem.factors[problem.factor_count++];
      factor = {order, nullptr, nullptr};
      const size_t size = static_cast<size_t>(order * (values.size() ? order : SignWords(order)));
      if (used + size > (values.size() ? values.size() : signs.size()))
        return Fail("the entries of an order " + std::to_string(order) + " are missing: there are " +
                    std::to_string(values.size() ? values.size() : signs.size()) + " in all");
      if (values.size()) {
        factor.values = values.begin();
      } else {
        factor.signs = signs.begin() + used;
      }
      used += size;
      if (power % order)
        return Fail("the order " + std::to_string(order) +
                    " must divide what others leave of n = " + std::to_string(problem.n));
      power /= order;
    }
    if (problem.rows > 0 && ((power & (power - 1)) || problem.n > kMaxLength))
      return Fail("n = " + std::to_string(problem.n) + " must be the orders times a power of two up to 2^24");
    return true;
  }

  bool ReadSigns(Problem& problem) {
    Span<uint32_t> signs;
    if (!Attribute("signs", signs) || !Attribute("signs_last", problem.signs_last)) return false;
    size_t words = signs.size();
    if (words) problem.signs = signs.begin();
    if (signs_) {
      words = signs_->element_count();
      problem.signs = static_cast<const uint32_t*>(signs_->untyped_data());
      problem.signs_on_device = true;
    }
    if (problem.signs && problem.rows > 0 && words != static_cast<size_t>(SignWords(problem.n)))
      return Fail("there must be " + std::to_string(SignWords(problem.n)) + " words of signs, got " +
                  std::to_string(words));
    return true;
  }

  bool ReadStride(Problem& problem) {
    int64_t behind = 0;
    if (!Attribute("behind", behind)) return false;
    const auto before = static_cast<int64_t>(x_.dimensions().size()) - 1;
    if (behind < 0 || behind > before)
      return Fail("behind must be from 0 to the " + std::to_string(before) + " dimensions before the last, got " +
                  std::to_string(behind));
    for (int64_t i = before - behind; i < before; ++i) problem.stride *= x_.dimensions()[static_cast<size_t>(i)];
    if (behind > 0 && problem.n != x_.dimensions().back())
      return Fail("a dimension with others behind it must be one transform, got n = " + std::to_string(problem.n));
    return true;
  }

  bool CheckResult(const Buffer& y) {
    if (given_) return Fail("an operand after x must be signs, of type u32");
    if (y.element_type() != x_.element_type() || y.element_count() != x_.element_count())
      return Fail("the result must have the operand's type and size");
    return true;
  }

  const xla::ffi::RemainingArgs& more_;
  const xla::ffi::Dictionary& attributes_;
  std::optional<Buffer> signs_;
  std::string why_;
};

// The parameters of every handler, up to its first result: the context, a stream or XLA's threads, x and what follows.
template <typename Context>
auto BindOperands() {
  using Buffer = xla::ffi::AnyBuffer;
  return xla::ffi::Ffi::Bind().Ctx<Context>().template Arg<Buffer>().RemainingArgs().template Ret<Buffer>();
}

}  // namespace jax_hadacore
