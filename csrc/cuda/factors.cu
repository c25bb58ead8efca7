// pick_rank: a warp a spectrum. scale_write: a thread a few entries of both factors, bound by memory.
#include "factors.h"

#include "device.cuh"

namespace loraforge::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTurns = 4; // entries a thread writes

// The sums run entry by entry, as on the CPU: every lane adds the same 32 values that the warp has loaded.
template <typename T>
__global__ void __launch_bounds__(kThreads) pick_rank_kernel(
    const T* S, int64_t rows, int64_t R, int64_t ld, int64_t step, double energy, int64_t least, int64_t most,
    int64_t* ranks) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / kWarp;
  if (row >= rows) {
    return; // whole warps
  }
  S += row * ld;
  double top = 0.0;
  for (int64_t i = lane; i < R; i += kWarp) {
    top = fmax(top, static_cast<double>(S[i * step]));
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    top = fmax(top, __shfl_xor_sync(kFullWarp, top, offset));
  }
  int exponent = 0;
  frexp(top, &exponent);
  const double unit = scalbn(1.0, exponent < -1000 ? 1000 : -exponent);
  double total = 0.0, head = 0.0;
  int64_t rank = top > 0.0 ? R : 0;
  for (int pass = 0; pass < 2; ++pass) {
    bool found = !(top > 0.0);
    for (int64_t base = 0; base < R && !found; base += kWarp) {
      const double value = base + lane < R ? static_cast<double>(S[(base + lane) * step]) * unit : 0.0;
      const double square = __dmul_rn(value, value);
      for (int from = 0; from < kWarp && base + from < R && !found; ++from) {
        const double next = __shfl_sync(kFullWarp, square, from);
        (pass == 0 ? total : head) += next;
        if (pass == 1 && head >= __dmul_rn(energy, total)) {
          rank = base + from + 1;
          found = true; // in all lanes at once
        }
      }
    }
  }
  rank = rank < least ? least : rank;
  if (lane == 0) {
    ranks[row] = rank < most ? rank : most;
  }
}

// A matrix or a vector of float32 or float64.
struct Source {
  const void* data;
  bool wide;
};

// U or Vh times the root of S, in their type: x[at] sqrt(s[k]).
template <typename To>
__device__ __forceinline__ To scaled(const Source& x, int64_t at, const void* s, int64_t k) {
  if (x.wide) {
    return store_as<To>(static_cast<const double*>(x.data)[at] * sqrt(static_cast<const double*>(s)[k]));
  }
  return store_as<To>(static_cast<const float*>(x.data)[at] * sqrtf(static_cast<const float*>(s)[k]));
}

template <typename To>
__global__ void __launch_bounds__(kThreads) scale_write_kernel(
    Source U, int64_t u0, int64_t u1, const void* S, int64_t step, Source Vh, int64_t v0, int64_t v1, int64_t m,
    int64_t n, int64_t rank, To* B, To* A) {
  const int64_t begin = blockIdx.x * int64_t{kThreads} * kTurns + threadIdx.x;
#pragma unroll 1
  for (int turn = 0; turn < kTurns; ++turn) {
    const int64_t at = begin + int64_t{turn} * kThreads;
    if (at < m * rank) {
      const int64_t row = at / rank, k = at % rank;
      B[at] = scaled<To>(U, row * u0 + k * u1, S, k * step);
    } else if (at < (m + n) * rank) {
      const int64_t rest = at - m * rank, k = rest / n, column = rest % n;
      A[rest] = scaled<To>(Vh, k * v0 + column * v1, S, k * step);
    }
  }
}

} // namespace

int pick_rank(
    Float kind, const void* S, int64_t rows, int64_t R, int64_t ld, int64_t step, double energy, int64_t least,
    int64_t most, int64_t* ranks, cudaStream_t stream) {
  if (rows == 0) {
    return 0;
  }
  const unsigned blocks = static_cast<unsigned>((rows * kWarp + kThreads - 1) / kThreads);
  if (kind == Float::f32) {
    LF_LAUNCH(
        pick_rank_kernel<float>, blocks, kThreads, 0, stream, static_cast<const float*>(S), rows, R, ld, step, energy,
        least, most, ranks);
  } else {
    LF_LAUNCH(
        pick_rank_kernel<double>, blocks, kThreads, 0, stream, static_cast<const double*>(S), rows, R, ld, step, energy,
        least, most, ranks);
  }
  return launched();
}

int scale_write(
    Float kind, Float to, Strided U, const void* S, int64_t step, Strided Vh, int64_t m, int64_t n, int64_t rank,
    void* B, void* A, cudaStream_t stream) {
  if ((m + n) * rank == 0) {
    return 0;
  }
  const int64_t per_block = int64_t{kThreads} * kTurns, blocks = ((m + n) * rank + per_block - 1) / per_block;
  const bool wide = kind == Float::f64;
  return for_float(to, [&](auto zero) {
    using To = decltype(zero);
    LF_LAUNCH(
        scale_write_kernel<To>, static_cast<unsigned>(blocks), kThreads, 0, stream, Source{U.data, wide}, U.row,
        U.column, S, step, Source{Vh.data, wide}, Vh.row, Vh.column, m, n, rank, static_cast<To*>(B),
        static_cast<To*>(A));
    return launched();
  });
}

} // namespace loraforge::cuda
