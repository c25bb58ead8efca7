// The largest entry of a short array, and the shared memory of a block: what the kernels on small matrices share.
#pragma once

#include "device.cuh"

namespace loraforge::cuda {

// The largest of now[0..n) and the first place it is at (n where none is above -1), the same in every lane. Each warp
// finds it for itself, so no barrier is needed.
__device__ __forceinline__ int warp_argmax(const double* now, int n, double& best) {
  int at = n;
  best = -1.0;
  for (int j = static_cast<int>(threadIdx.x) % kWarp; j < n; j += kWarp) {
    if (now[j] > best) {
      best = now[j];
      at = j;
    }
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const double other = __shfl_xor_sync(kFullWarp, best, offset);
    const int place = __shfl_xor_sync(kFullWarp, at, offset);
    if (other > best || (other == best && place < at)) {
      best = other;
      at = place;
    }
  }
  return at;
}

// Bytes of shared memory that a block of the current device can have.
inline int64_t most_shared() {
#if defined(__CUDACC__)
  int device = 0, bytes = 48 * 1024;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
#else
  return static_cast<int64_t>(emulator::kSharedLimit);
#endif
}

// Lets a kernel have all of that memory, whatever a launch takes: threads that launch it with other sizes then never
// lower each other's limit. The kernel has no static shared memory. 0 is success; a failure does not stay behind as the
// last error, where the next launch would find it.
template <typename Kernel>
int allow_most_shared(Kernel kernel) {
  const auto bytes = static_cast<int>(most_shared());
  const auto code = static_cast<int>(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  return code == 0 ? 0 : (launched(), code);
}

} // namespace loraforge::cuda
