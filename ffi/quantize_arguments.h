// quantize_arguments.h: reads what a call that quantises is given besides a Problem, and where its results go. For
// *_ffi.cc only.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>

#include "arguments.h"
#include "quantization.h"

namespace jax_hadacore {

struct QuantizedTransform {
  Problem problem;
  Quantization quantization;
  QuantizedBuffers results;
};

// The attributes of a call, besides those that ProblemReader reads:
//   code (string)           float8_e4m3fn, float8_e5m2, float4_e2m1fn, int8 or int4
//   scale_type (string)     float32, float8_e8m0fnu, float8_e4m3fn, or given
//   group (int64)           how many consecutive results share a scale; by default the last dimension
//   asymmetric (bool)       int4 with zero points
// The given scale, or the tensor's, is an operand, a float32 number. Results:
//   codes                   x's shape in the code's type; 4-bit codes as uint8, half as many
//   scales                  one for each group, where they are not given
//   zero points (int8)      one for each group, where asymmetric
// A kernel may have results of its own after these.
class QuantizationReader : private ProblemReader {
 public:
  using ProblemReader::ProblemReader;

  xla::ffi::ErrorOr<QuantizedTransform> Read(const xla::ffi::AnyBuffer& codes, const xla::ffi::RemainingRets& more) {
    QuantizedTransform call{};
    if (ReadProblem(call.problem) && IsOfRows(call.problem) && ReadQuantization(call.quantization) &&
        ReadCodes(codes, call) && ReadPerGroup(more, call))
      return call;
    return Error();
  }

 private:
  // What an attribute may say, and the type of the results that go with it.
  template <typename T>
  struct Choice {
    std::string_view name;
    T value;
    xla::ffi::DataType type;
  };

  template <typename T, size_t kCount>
  bool Choose(const char* attribute, const Choice<T> (&choices)[kCount], T& value, xla::ffi::DataType& type) {
    std::string_view name;
    if (!Attribute(attribute, name)) return false;
    std::string names;
    for (const Choice<T>& choice : choices) {
      if (choice.name == name) {
        value = choice.value;
        type = choice.type;
        return true;
      }
      names.append(names.empty() ? "" : ", ").append(choice.name);
    }
    return Fail(std::string("the attribute ") + attribute + " must be one of " + names + ", got '" + std::string(name) +
                "'");
  }

  bool ReadQuantization(Quantization& quantization) {
    namespace ffi = xla::ffi;
    static constexpr Choice<Code> kCodes[] = {{"float8_e4m3fn", Code::kFloat8E4M3, ffi::F8E4M3FN},
                                              {"float8_e5m2", Code::kFloat8E5M2, ffi::F8E5M2},
                                              {"float4_e2m1fn", Code::kFloat4E2M1, ffi::U8},
                                              {"int8", Code::kInt8, ffi::S8},
                                              {"int4", Code::kInt4, ffi::U8}};
    static constexpr Choice<Scale> kScales[] = {{"float32", Scale::kFloat32, ffi::F32},
                                                {"float8_e8m0fnu", Scale::kE8M0, ffi::F8E8M0FNU},
                                                {"float8_e4m3fn", Scale::kE4M3, ffi::F8E4M3FN},
                                                {"given", Scale::kGiven, ffi::DataType::INVALID}};
    quantization.group = x_.dimensions().back();
    if (!Choose("code", kCodes, quantization.code, code_type_) ||
        !Choose("scale_type", kScales, quantization.scale, scale_type_) || !Attribute("group", quantization.group) ||
        !Attribute("asymmetric", quantization.asymmetric))
      return false;
    return CheckCombination(quantization) && ReadGiven(quantization);
  }

  // Kernels know no others.
  bool CheckCombination(const Quantization& quantization) {
    if (x_.element_type() == xla::ffi::F64) return Fail("the element type must be f16, bf16 or f32 to be quantised");
    const Code code = quantization.code;
    bool exists = false;
    switch (quantization.scale) {
      case Scale::kFloat32:
      case Scale::kGiven: exists = code != Code::kFloat4E2M1; break;
      case Scale::kE8M0: exists = code == Code::kFloat8E4M3 || code == Code::kFloat4E2M1; break;
      case Scale::kE4M3: exists = code == Code::kFloat4E2M1; break;
    }
    if (!exists) return Fail("there are no such codes with scales of that type");
    if (quantization.asymmetric && (code != Code::kInt4 || quantization.scale != Scale::kFloat32))
      return Fail("zero points go with codes of int4 and scales of float32");
    return true;
  }

  bool ReadGiven(Quantization& quantization) {
    if (quantization.scale == Scale::kGiven && !given_) return Fail("the given scale, an operand of f32, is missing");
    if (!given_) return true;
    if (quantization.scale != Scale::kGiven && quantization.scale != Scale::kE4M3)
      return Fail("scales of that type have no scale as an operand");
    if (given_->element_count() != 1)
      return Fail("the given scale must be one number, got " + std::to_string(given_->element_count()));
    quantization.given = static_cast<const float*>(given_->untyped_data());
    return true;
  }

  bool ReadCodes(const Buffer& codes, QuantizedTransform& call) {
    const int64_t last = x_.dimensions().back(), group = call.quantization.group,
                  per_byte = 8 / CodeBits(call.quantization.code);
    if (group < 1 || last % group != 0 || group % per_byte != 0)
      return Fail("the last dimension, " + std::to_string(last) + ", must be a multiple of group = " +
                  std::to_string(group) + (per_byte == 2 ? ", which must be even" : ""));
    call.results.codes = codes.untyped_data();
    return CheckArray("codes", codes, code_type_, static_cast<int64_t>(x_.element_count()) / per_byte);
  }

  bool ReadPerGroup(const xla::ffi::RemainingRets& more, QuantizedTransform& call) {
    const int64_t groups = static_cast<int64_t>(x_.element_count()) / call.quantization.group;
    size_t used = 0;
    const auto read = [&](const char* name, xla::ffi::DataType type, auto*& to) {
      auto result = more.get<Buffer>(used++);
      if (result.has_error()) return Fail(std::string("there is no array for ") + name);
      to = static_cast<std::remove_reference_t<decltype(to)>>((*result)->untyped_data());
      return CheckArray(name, **result, type, groups);
    };
    return (call.quantization.scale == Scale::kGiven || read("scales", scale_type_, call.results.scales)) &&
           (!call.quantization.asymmetric || read("zero points", xla::ffi::S8, call.results.zero_points));
  }

  bool CheckArray(const char* name, const Buffer& result, xla::ffi::DataType type, int64_t count) {
    if (result.element_type() == type && static_cast<int64_t>(result.element_count()) == count) return true;
    return Fail(std::string(name) + " must be " + std::to_string(count) + " of " + Name(type) + ", got " +
                std::to_string(result.element_count()) + " of " + Name(result.element_type()));
  }

  xla::ffi::DataType code_type_, scale_type_;
};

}  // namespace jax_hadacore
