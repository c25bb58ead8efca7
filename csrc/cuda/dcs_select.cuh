// Order statistics of n non-negative doubles, by one block: a radix select on their bits, which order as they do.
#pragma once

#include "device.cuh"

namespace loraforge::cuda {

using Bits = unsigned long long;

constexpr int kDigit = 8; // bits a pass; a block has a thread for each value of a digit
constexpr int kDigits = 1 << kDigit;
constexpr Bits kInfinityBits = 0x7FF0000000000000ull;

__device__ __forceinline__ Bits bits_of(double x) {
  return static_cast<Bits>(__double_as_longlong(x));
}
__device__ __forceinline__ double from_bits(Bits x) {
  return __longlong_as_double(static_cast<long long>(x));
}

// The largest x of the block's threads, in all of them. `scratch`: a value a warp, free again after the call.
__device__ __forceinline__ Bits block_most(Bits x, Bits* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Bits other = __shfl_xor_sync(kFullWarp, x, offset);
    x = other > x ? other : x;
  }
  if (lane == 0) {
    scratch[warp] = x;
  }
  __syncthreads();
  for (int part = 0; part < static_cast<int>(blockDim.x) / kWarp; ++part) {
    x = scratch[part] > x ? scratch[part] : x;
  }
  __syncthreads();
  return x;
}

// The least and the largest of value(0..n), n >= 1.
struct Extremes {
  Bits least, most;
};

template <typename Value>
__device__ Extremes extremes(const Value& value, int64_t n) {
  __shared__ Bits scratch[kWarp];
  Bits most = 0, flipped = 0; // the least of x is the largest of ~x
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    const Bits x = value(i);
    most = x > most ? x : most;
    flipped = ~x > flipped ? ~x : flipped;
  }
  most = block_most(most, scratch);
  return {~block_most(flipped, scratch), most};
}

struct Ranked {
  Bits value;
  int64_t below; // how many values are less
};

// The value of rank k, 0 <= k < n. Starts at the highest bit in which the values differ and stops as soon as one value
// is left; `within` are their extremes. A block of 256 threads.
template <typename Value>
__device__ Ranked ranked(const Value& value, int64_t n, int64_t k, Extremes within) {
  __shared__ unsigned counts[kDigits], warps[kDigits / kWarp];
  __shared__ Bits chosen;
  __shared__ unsigned before, inside;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  Bits prefix = within.least; // its bits from `open` on are those of the answer
  int64_t below = 0;
  int open = 0;
  while (open < 63 && (within.least >> open) != (within.most >> open)) {
    ++open;
  }
  counts[threadIdx.x] = 0;
  __syncthreads();
  while (open > 0) {
    const int low = open > kDigit ? open - kDigit : 0;
    const Bits digits = (Bits{1} << (open - low)) - 1;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      const Bits x = value(i);
      if ((x >> open) == (prefix >> open)) {
        atomicAdd(&counts[(x >> low) & digits], 1u);
      }
    }
    __syncthreads();
    const unsigned mine = counts[threadIdx.x];
    unsigned upto = mine;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const unsigned other = __shfl_up_sync(kFullWarp, upto, offset);
      upto += lane >= offset ? other : 0u;
    }
    if (lane == kWarp - 1) {
      warps[warp] = upto;
    }
    counts[threadIdx.x] = 0;
    __syncthreads();
    for (int part = 0; part < warp; ++part) {
      upto += warps[part];
    }
    if (below + (upto - mine) <= k && k < below + upto) {
      chosen = (prefix >> open << open) | (static_cast<Bits>(threadIdx.x) << low);
      before = upto - mine;
      inside = mine;
    }
    __syncthreads();
    prefix = chosen;
    below += before;
    open = low;
    if (inside == 1 && open > 0) {
      __syncthreads(); // before chosen is written again
      for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
        const Bits x = value(i);
        if ((x >> open) == (prefix >> open)) {
          chosen = x;
        }
      }
      __syncthreads();
      prefix = chosen;
      break;
    }
  }
  __syncthreads(); // shared memory is free for the next call
  return {prefix, below};
}

// Median with the average of the two middle values.
template <typename Value>
__device__ double median(const Value& value, int64_t n, Extremes within) {
  __shared__ Bits scratch[kWarp];
  const Ranked upper = ranked(value, n, n / 2, within);
  if (n % 2 == 1) {
    return from_bits(upper.value);
  }
  Bits lower = upper.value;
  if (upper.below == n / 2) { // it is the first of its kind: the other middle value is the largest below it
    Bits most = 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      const Bits x = value(i);
      most = x < upper.value && x > most ? x : most;
    }
    lower = block_most(most, scratch);
  }
  return 0.5 * from_bits(lower) + 0.5 * from_bits(upper.value);
}

} // namespace loraforge::cuda
