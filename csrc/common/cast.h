// Rows of any float type to and from the type that an operator computes in. Rounding is that of Tensor.to().
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "isa.h"

namespace loraforge {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <typename T>
LF_BODY float narrow(T value) {
  return static_cast<float>(value);
}

template <>
LF_BODY float narrow(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.x) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

template <typename T>
LF_BODY T round_to(float value) {
  return static_cast<T>(value);
}

// Round to nearest even without a branch, so that the loop around it is vectorised; a NaN stays one.
template <>
LF_BODY BFloat16 round_to<BFloat16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return BFloat16(static_cast<uint16_t>(value != value ? 0x7FC0u : rounded), BFloat16::from_bits());
}

template <typename From, typename To>
LF_BODY To cast_one(From value) {
  if constexpr (std::is_same_v<From, double> && std::is_same_v<To, double>) {
    return value;
  } else if constexpr (std::is_same_v<From, double>) {
    return round_to<To>(static_cast<float>(value));
  } else if constexpr (std::is_same_v<To, double>) {
    return static_cast<double>(narrow(value));
  } else {
    return round_to<To>(narrow(value));
  }
}

// Calls f with a value of the C++ type of a float dtype.
template <typename F>
void for_float_type(torch::headeronly::ScalarType dtype, const F& f) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      return f(Half{});
  }
}

} // namespace loraforge
