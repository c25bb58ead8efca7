// Kernels with one planted mistake each: what the emulator and the sanitizers must find.
#include "../../../csrc/cuda/device.cuh"
#include "cases.h"

using namespace loraforge::cuda;

namespace {

__global__ void fine(const double* x, double* out, int n) {
  __shared__ double scratch[kWarp];
  const int i = static_cast<int>(threadIdx.x);
  const double total = block_sum(i < n ? x[i] : 0.0, scratch);
  if (i == 0) {
    *out = total;
  }
}

__global__ void divergent(double* out) {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  }
  *out = 1.0;
}

__global__ void two_barriers(double* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  *out = 1.0;
}

__global__ void half_a_shuffle(double* out) {
  if (threadIdx.x % kWarp < 16) {
    *out = __shfl_xor_sync(kFullWarp, 1.0, 1);
  }
}

__global__ void beyond_shared(double* out) {
  LF_DYNAMIC_SHARED(double, values);
  values[threadIdx.x + 1] = 1.0;
  __syncthreads();
  if (threadIdx.x == 0) {
    *out = values[1];
  }
}

__global__ void beyond_global(double* out) {
  out[threadIdx.x] = 1.0;
}

__global__ void missing_barrier(double* out) {
  __shared__ double values[64];
  values[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = values[63 - threadIdx.x];
}

} // namespace

LF_CASE(fine) {
  LF_LAUNCH(fine, 1, 96, 0, nullptr, c.data<double>("x"), c.make<double>("out", "f64", {1}), static_cast<int>(c.size("x", 0)));
  return launched();
}
LF_CASE(divergent) {
  LF_LAUNCH(divergent, 1, 64, 0, nullptr, c.make<double>("out", "f64", {1}));
  return launched();
}
LF_CASE(two_barriers) {
  LF_LAUNCH(two_barriers, 1, 64, 0, nullptr, c.make<double>("out", "f64", {1}));
  return launched();
}
LF_CASE(half_a_shuffle) {
  LF_LAUNCH(half_a_shuffle, 1, 32, 0, nullptr, c.make<double>("out", "f64", {1}));
  return launched();
}
LF_CASE(beyond_shared) {
  LF_LAUNCH(beyond_shared, 1, 32, 32 * sizeof(double), nullptr, c.make<double>("out", "f64", {1}));
  return launched();
}
LF_CASE(too_much_shared) {
  LF_LAUNCH(beyond_shared, 1, 32, 64 * 1024, nullptr, c.make<double>("out", "f64", {1}));
  return launched();
}
LF_CASE(beyond_global) {
  LF_LAUNCH(beyond_global, 1, 32, 0, nullptr, c.make<double>("out", "f64", {31}));
  return launched();
}
LF_CASE(missing_barrier) {
  LF_LAUNCH(missing_barrier, 1, 64, 0, nullptr, c.make<double>("out", "f64", {64}));
  return launched();
}
