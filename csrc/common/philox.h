// Philox4x64 with 10 rounds (Salmon et al., SC 2011) as numpy.random.Philox counts: entry e of a stream has the 32 bits
// e % 8 of the block of counter e / 8 + 1, low halves of the four words first. Whole numbers only: every machine draws
// the same bits.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace loraforge {

constexpr int kDrawsPerBlock = 8;
constexpr int kPhiloxRounds = 10;
constexpr uint64_t kPhiloxMultiply0 = 0xD2E7470EE14C6C93u, kPhiloxMultiply1 = 0xCA5A826395121157u;
constexpr uint64_t kPhiloxStep0 = 0x9E3779B97F4A7C15u, kPhiloxStep1 = 0xBB67AE8584CAA73Bu;

struct PhiloxKey {
  uint64_t low;
  uint64_t high;
};

// The 128 bits of a product.
LF_HD void multiply(uint64_t a, uint64_t b, uint64_t& high, uint64_t& low) {
#if defined(__CUDA_ARCH__)
  high = __umul64hi(a, b);
  low = a * b;
#else
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  high = static_cast<uint64_t>(product >> 64);
  low = static_cast<uint64_t>(product);
#endif
}

// The eight draws of entries 8 * block .. 8 * block + 7.
LF_HD void philox_block(PhiloxKey key, uint64_t block, uint32_t (&draws)[kDrawsPerBlock]) {
  uint64_t x0 = block + 1, x1 = 0, x2 = 0, x3 = 0, key0 = key.low, key1 = key.high;
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif !defined(__CUDACC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    uint64_t high0, low0, high1, low1;
    multiply(kPhiloxMultiply0, x0, high0, low0);
    multiply(kPhiloxMultiply1, x2, high1, low1);
    x0 = high1 ^ x1 ^ key0;
    x1 = low1;
    x2 = high0 ^ x3 ^ key1;
    x3 = low0;
    key0 += kPhiloxStep0;
    key1 += kPhiloxStep1;
  }
  draws[0] = static_cast<uint32_t>(x0);
  draws[1] = static_cast<uint32_t>(x0 >> 32);
  draws[2] = static_cast<uint32_t>(x1);
  draws[3] = static_cast<uint32_t>(x1 >> 32);
  draws[4] = static_cast<uint32_t>(x2);
  draws[5] = static_cast<uint32_t>(x2 >> 32);
  draws[6] = static_cast<uint32_t>(x3);
  draws[7] = static_cast<uint32_t>(x3 >> 32);
}

} // namespace loraforge
