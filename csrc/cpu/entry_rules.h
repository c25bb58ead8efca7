// What a rule does to a tile of one adapter: limits of magnitudes, random draws, a factor.
#pragma once

#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include "../common/philox.h"
#include "entry_tiles.h"

namespace loraforge {
namespace {

// What a rule does to the entries of one adapter.
struct Rule {
  double low;      // smaller magnitudes become 0
  double high;     // larger magnitudes become 0
  PhiloxKey key;   // of the draws
  uint64_t limit;  // an entry is kept where its draw is below; 2^32 keeps all and draws nothing
  double gain;     // of what a draw keeps
  double weight;   // of what is left
};

constexpr uint64_t kAll = uint64_t{1} << 32;

// A NaN compares as neither smaller nor larger and stays; one that a draw drops stays too, as 0 times it is NaN.
template <typename T>
LF_BODY void bound_body(T* x, int64_t n, T low, T high) {
  using V = typename Lanes<T>::Vector;
  using M = typename Lanes<T>::Mask;
  for (int64_t at = 0; at < n; at += Lanes<T>::kCount) {
    V value;
    std::memcpy(&value, x + at, sizeof(value));
    const V size = value < T(0) ? -value : value;
    const M keep = ~(M)(size < low);
    V kept = (V)((M)value & keep);
    kept -= size > high ? value : V{}; // infinity minus itself is NaN, which is seen
    std::memcpy(x + at, &kept, sizeof(kept));
  }
}

LF_CLONES void bound(float* x, int64_t n, float low, float high) {
  bound_body(x, n, low, high);
}
LF_CLONES void bound(double* x, int64_t n, double low, double high) {
  bound_body(x, n, low, high);
}

#if defined(__x86_64__) && defined(__GNUC__)
#define LF_WIDE_DRAWS 1
#define LF_AVX512 __attribute__((target("avx512f")))

typedef uint64_t Eight __attribute__((vector_size(64)));

// Low halves of eight numbers, multiplied.
LF_AVX512 inline Eight multiply_low(Eight a, Eight b) {
  return (Eight)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, (__m512i)b);
}

// Both halves of eight 128-bit products with a constant.
LF_AVX512 inline void multiply_eight(Eight x, uint64_t by, Eight& high, Eight& low) {
  const Eight x_high = x >> 32, by_low = Eight{} + (by & 0xFFFFFFFFu), by_high = Eight{} + (by >> 32);
  const Eight bottom = multiply_low(x, by_low);
  const Eight inner = multiply_low(x, by_high) + (bottom >> 32);
  const Eight outer = multiply_low(x_high, by_low) + (inner & 0xFFFFFFFFu);
  high = multiply_low(x_high, by_high) + (inner >> 32) + (outer >> 32);
  low = (outer << 32) | (bottom & 0xFFFFFFFFu);
}

// philox_block of eight blocks from `block` on.
LF_AVX512 void draw_eight(PhiloxKey key, uint64_t block, uint32_t* draws) {
  Eight high0, low0, high1, low1;
  multiply_eight(Eight{1, 2, 3, 4, 5, 6, 7, 8} + block, kPhiloxMultiply0, high0, low0);
  // In round 0 three words are 0, in round 1 the first is the key: products of these are known.
  uint64_t known_high, known_low;
  multiply(kPhiloxMultiply0, key.low, known_high, known_low);
  multiply_eight(high0 ^ key.high, kPhiloxMultiply1, high1, low1);
  key.low += kPhiloxStep0;
  key.high += kPhiloxStep1;
  Eight x0 = high1 ^ key.low, x1 = low1, x2 = low0 ^ (known_high ^ key.high), x3 = Eight{} + known_low;
#pragma GCC unroll 8
  for (int round = 2; round < kPhiloxRounds; ++round) {
    key.low += kPhiloxStep0;
    key.high += kPhiloxStep1;
    multiply_eight(x0, kPhiloxMultiply0, high0, low0);
    multiply_eight(x2, kPhiloxMultiply1, high1, low1);
    x0 = high1 ^ x1 ^ key.low;
    x1 = low1;
    x2 = high0 ^ x3 ^ key.high;
    x3 = low0;
  }
  // Word w of block b goes to place 4 b + w.
  const Eight even01 = __builtin_shufflevector(x0, x1, 0, 8, 2, 10, 4, 12, 6, 14);
  const Eight odd01 = __builtin_shufflevector(x0, x1, 1, 9, 3, 11, 5, 13, 7, 15);
  const Eight even23 = __builtin_shufflevector(x2, x3, 0, 8, 2, 10, 4, 12, 6, 14);
  const Eight odd23 = __builtin_shufflevector(x2, x3, 1, 9, 3, 11, 5, 13, 7, 15);
  const Eight even_first = __builtin_shufflevector(even01, even23, 0, 1, 8, 9, 2, 3, 10, 11);
  const Eight even_last = __builtin_shufflevector(even01, even23, 4, 5, 12, 13, 6, 7, 14, 15);
  const Eight odd_first = __builtin_shufflevector(odd01, odd23, 0, 1, 8, 9, 2, 3, 10, 11);
  const Eight odd_last = __builtin_shufflevector(odd01, odd23, 4, 5, 12, 13, 6, 7, 14, 15);
  const Eight turned[4] = {
      __builtin_shufflevector(even_first, odd_first, 0, 1, 2, 3, 8, 9, 10, 11),
      __builtin_shufflevector(even_first, odd_first, 4, 5, 6, 7, 12, 13, 14, 15),
      __builtin_shufflevector(even_last, odd_last, 0, 1, 2, 3, 8, 9, 10, 11),
      __builtin_shufflevector(even_last, odd_last, 4, 5, 6, 7, 12, 13, 14, 15)};
  std::memcpy(draws, turned, sizeof(turned));
}

bool draws_eight_at_once() {
  static const bool can = __builtin_cpu_supports("avx512f") != 0;
  return can;
}
#endif

constexpr int64_t kDrawn = 64; // draws of one turn

// Draws of entries first .. first + count, count <= kDrawn; `buffer` holds kDrawn + 8. Returns where they begin.
LF_CLONES const uint32_t* draw(PhiloxKey key, uint64_t first, int64_t count, uint32_t* buffer) {
  const uint64_t skip = first % kDrawsPerBlock, block = first / kDrawsPerBlock;
  const int64_t blocks = (static_cast<int64_t>(skip) + count + kDrawsPerBlock - 1) / kDrawsPerBlock;
  int64_t b = 0;
#ifdef LF_WIDE_DRAWS
  if (blocks >= 8 && draws_eight_at_once()) {
    draw_eight(key, block, buffer);
    b = 8;
  }
#endif
  for (; b < blocks; ++b) {
    philox_block(key, block + static_cast<uint64_t>(b), *reinterpret_cast<uint32_t(*)[kDrawsPerBlock]>(buffer + 8 * b));
  }
  return buffer + skip;
}

template <typename T>
LF_BODY void keep_body(T* x, const uint32_t* draws, int64_t n, uint32_t limit, T gain) {
  using V = typename Lanes<T>::Vector;
  using M = typename Lanes<T>::Mask;
  constexpr int64_t kWide = Lanes<T>::kCount;
  typedef uint32_t Drawn __attribute__((vector_size(4 * kWide)));
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
    V value;
    Drawn drawn;
    std::memcpy(&value, x + i, sizeof(value));
    std::memcpy(&drawn, draws + i, sizeof(drawn));
    const M kept = __builtin_convertvector(drawn < limit, M);
    value *= (V)((M)(V{} + gain) & kept);
    std::memcpy(x + i, &value, sizeof(value));
  }
  for (; i < n; ++i) {
    x[i] *= draws[i] < limit ? gain : T(0);
  }
}

LF_CLONES void keep(float* x, const uint32_t* draws, int64_t n, uint32_t limit, float gain) {
  keep_body(x, draws, n, limit, gain);
}
LF_CLONES void keep(double* x, const uint32_t* draws, int64_t n, uint32_t limit, double gain) {
  keep_body(x, draws, n, limit, gain);
}

template <typename T>
LF_BODY void scale_body(T* x, int64_t n, T factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    x[i] *= factor;
  }
}

LF_CLONES void scale(float* x, int64_t n, float factor) {
  scale_body(x, n, factor);
}
LF_CLONES void scale(double* x, int64_t n, double factor) {
  scale_body(x, n, factor);
}

// `width` entries of `x` that begin at entry `first` of their matrix.
template <typename T>
void draw_and_keep(T* x, const Rule& rule, uint64_t first, int64_t width) {
  alignas(64) uint32_t buffer[kDrawn + kDrawsPerBlock];
  for (int64_t at = 0; at < width; at += kDrawn) {
    const int64_t count = std::min(kDrawn, width - at);
    const uint32_t* draws = draw(rule.key, first + static_cast<uint64_t>(at), count, buffer);
    keep(x + at, draws, count, static_cast<uint32_t>(rule.limit), static_cast<T>(rule.gain));
  }
}

// `first` is the number of the entry at (0, 0).
template <typename T>
void apply(T* x, const Rule& rule, const Place& place, uint64_t first, bool weigh) {
  const T low = static_cast<T>(rule.low), high = static_cast<T>(rule.high);
  if (low > T(0) || high < std::numeric_limits<T>::infinity()) {
    bound(x, place.rows * place.strip, low, high);
  }
  if (rule.limit < kAll) {
    for (int64_t i = 0; i < place.rows; ++i) {
      const uint64_t entry = first + static_cast<uint64_t>((place.row + i) * place.n + place.at);
      draw_and_keep(x + i * place.strip, rule, entry, place.width);
    }
  }
  if (weigh && rule.weight != 1.0) {
    scale(x, place.rows * place.strip, static_cast<T>(rule.weight));
  }
}

} // namespace
} // namespace loraforge
