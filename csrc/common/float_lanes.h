// Eight numbers of any float type to and from the lanes that an operator computes in: float for all but double.
// Rounding is that of Tensor.to().
#pragma once

#include <cstring>

#include "cast.h"
#include "isa.h"

namespace loraforge {

typedef uint16_t ShortLanes __attribute__((vector_size(16)));
typedef uint32_t WordLanes __attribute__((vector_size(32)));

// The type, and its lanes, that values of T are computed in.
template <typename T>
struct Computed {
  using type = float;
  using lanes = FloatLanes;
};
template <>
struct Computed<double> {
  using type = double;
  using lanes = DoubleLanes;
};

LF_BODY void load_wide(const double* from, DoubleLanes& to) {
  std::memcpy(&to, from, sizeof(to));
}

LF_BODY void load_wide(const float* from, FloatLanes& to) {
  std::memcpy(&to, from, sizeof(to));
}

LF_BODY void load_wide(const BFloat16* from, FloatLanes& to) {
  ShortLanes bits;
  std::memcpy(&bits, from, sizeof(bits));
  to = reinterpret_cast<FloatLanes>(__builtin_convertvector(bits, WordLanes) << 16);
}

// Exponent and fraction move to their places in a float, which is then 2^112 too small; subnormals come out right.
LF_BODY void load_wide(const Half* from, FloatLanes& to) {
  ShortLanes bits;
  std::memcpy(&bits, from, sizeof(bits));
  const WordLanes word = __builtin_convertvector(bits, WordLanes), magnitude = (word & 0x7FFFu) << 13;
  const WordLanes scaled = reinterpret_cast<WordLanes>(reinterpret_cast<FloatLanes>(magnitude) * 0x1p112f);
  const WordLanes special = reinterpret_cast<WordLanes>(magnitude >= 0x0F800000u); // infinity and NaN
  to = reinterpret_cast<FloatLanes>(scaled | (special & 0x7F800000u) | ((word & 0x8000u) << 16));
}

LF_BODY void store_wide(const DoubleLanes& from, double* to) {
  std::memcpy(to, &from, sizeof(from));
}

LF_BODY void store_wide(const FloatLanes& from, float* to) {
  std::memcpy(to, &from, sizeof(from));
}

LF_BODY void store_wide(const FloatLanes& from, BFloat16* to) {
  const WordLanes word = reinterpret_cast<WordLanes>(from), nan = reinterpret_cast<WordLanes>(from != from);
  const WordLanes rounded = (word + 0x7FFFu + ((word >> 16) & 1u)) >> 16;
  const ShortLanes bits = __builtin_convertvector((rounded & ~nan) | (nan & 0x7FC0u), ShortLanes);
  std::memcpy(to, &bits, sizeof(bits));
}

// To nearest even without a branch. Below 2^-14 the result is subnormal, and adding 0.5 leaves its bits at the end of
// the sum; from 65520 on it is infinite.
LF_BODY void store_wide(const FloatLanes& from, Half* to) {
  const WordLanes word = reinterpret_cast<WordLanes>(from), magnitude = word & 0x7FFFFFFFu;
  const WordLanes small = reinterpret_cast<WordLanes>(reinterpret_cast<FloatLanes>(magnitude) + 0.5f) - 0x3F000000u;
  const WordLanes normal = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  const WordLanes is_small = reinterpret_cast<WordLanes>(magnitude < 0x38800000u);
  const WordLanes is_large = reinterpret_cast<WordLanes>(magnitude >= 0x477FF000u);
  const WordLanes is_nan = reinterpret_cast<WordLanes>(magnitude > 0x7F800000u);
  WordLanes bits = (small & is_small) | (normal & ~is_small);
  bits = (bits & ~is_large) | (is_large & 0x7C00u) | (is_nan & 0x0200u);
  const ShortLanes narrow = __builtin_convertvector(bits | ((word >> 16) & 0x8000u), ShortLanes);
  std::memcpy(to, &narrow, sizeof(narrow));
}

// The first n < kLanes of the numbers, zeros after them; and back.
template <typename T, typename Lanes>
LF_BODY void load_some(const T* from, int64_t n, Lanes& to) {
  T padded[kLanes] = {};
  std::memcpy(static_cast<void*>(padded), from, static_cast<size_t>(n) * sizeof(T));
  load_wide(padded, to);
}

template <typename T, typename Lanes>
LF_BODY void store_some(const Lanes& from, int64_t n, T* to) {
  T padded[kLanes];
  store_wide(from, padded);
  std::memcpy(static_cast<void*>(to), padded, static_cast<size_t>(n) * sizeof(T));
}

} // namespace loraforge
