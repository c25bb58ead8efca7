// What device code may use. Under nvcc this is CUDA; under a plain C++ compiler it is the thread emulator, which runs the
// same text on the CPU. Kernels keep to: __syncthreads in uniform control flow, full-warp shuffles, integer atomics,
// LF_LAUNCH, LF_DYNAMIC_SHARED and what is defined here.
#pragma once

#include <cstdint>
#include <type_traits>

#include "launch.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define LF_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define LF_DYNAMIC_SHARED(T, name)                                     \
  extern __shared__ __align__(16) unsigned char lf_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(lf_dynamic_shared)
#else
#include "../emulator/thread_emulator.h"
#endif

#include "../common/host_device.h"

namespace loraforge::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xFFFFFFFFu;

// 16-bit floats as they lie in memory.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// Four entries that are loaded and stored at once.
template <typename T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Four {
  T at[4];
};

__device__ __forceinline__ float as_float(float x) {
  return x;
}
__device__ __forceinline__ float as_float(Bf16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
__device__ __forceinline__ float as_float(F16 x) {
  return __half2float(__ushort_as_half(x.bits));
}
__device__ __forceinline__ float as_float(double x) {
  return static_cast<float>(x);
}

template <typename T>
__device__ __forceinline__ double as_double(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return static_cast<double>(as_float(x));
  }
}

// Rounding to nearest even; a NaN stays one. The same bits as Tensor.to().
template <typename T>
__device__ __forceinline__ T round_to(float x) {
  if constexpr (std::is_same_v<T, Bf16>) {
    const unsigned bits = __float_as_uint(x);
    const unsigned rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return Bf16{static_cast<uint16_t>(x != x ? 0x7FC0u : rounded)};
  } else if constexpr (std::is_same_v<T, F16>) {
    return F16{__half_as_ushort(__float2half_rn(x))};
  } else {
    return static_cast<T>(x);
  }
}

// From the type that an operator computed in. Double to 16 bits goes through float, as on the CPU.
template <typename T, typename From>
__device__ __forceinline__ T store_as(From x) {
  if constexpr (std::is_same_v<T, From>) {
    return x;
  } else {
    return round_to<T>(static_cast<float>(x));
  }
}

// Sum over a warp, the same bits in every lane; all lanes take part.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kFullWarp, x, offset);
  }
  return x;
}

// Sum over a block of at most 1024 threads (a multiple of 32), the same bits in every thread. `scratch` holds a value a
// warp and is free again after the call.
template <typename T>
__device__ __forceinline__ T block_sum(T x, T* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  x = warp_sum(x);
  if (lane == 0) {
    scratch[warp] = x;
  }
  __syncthreads();
  x = warp_sum(lane < warps ? scratch[lane] : T(0));
  __syncthreads();
  return x;
}

// Code of the last launch of this thread; 0 is success.
inline int launched() {
  return static_cast<int>(cudaGetLastError());
}

// Calls f with a value of the type of a code.
template <typename F>
int for_float(Float kind, const F& f) {
  switch (kind) {
    case Float::f32:
      return f(float{});
    case Float::f64:
      return f(double{});
    case Float::bf16:
      return f(Bf16{});
    default:
      return f(F16{});
  }
}

} // namespace loraforge::cuda
