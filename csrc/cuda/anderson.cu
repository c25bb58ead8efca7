// Anderson mixing: both kernels read every number once, in 16-byte loads, and are bound by memory.
//
// Bytes: dots (m + 1) P e, mix (2 m + 1) P e with e bytes an entry. Sums and products are taken in double.
#include "anderson.h"

#include "device.cuh"

namespace loraforge::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWide = 4;   // entries a load
constexpr int kTurns = 8;  // loads of a row by a thread
constexpr int kRows = 4;   // rows that share the loads of f
constexpr int64_t kChunk = int64_t{kThreads} * kWide * kTurns;

// Four entries from `at`, zeros from `end` on; one load where all are there and rows are aligned.
template <typename T, bool kAligned>
__device__ __forceinline__ void load_four(const T* row, int64_t at, int64_t end, double (&to)[kWide]) {
  if (kAligned && at + kWide <= end) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(row + at);
#pragma unroll
    for (int k = 0; k < kWide; ++k) {
      to[k] = as_double(four.at[k]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kWide; ++k) {
      to[k] = at + k < end ? as_double(row[at + k]) : 0.0;
    }
  }
}

// Partial sums of one chunk a block; the block that finishes last adds the partials in their order.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 4) dots_kernel(
    const T* H, int64_t ld, const T* f, int64_t m, int64_t P, double* partial, unsigned* ticket, double* out) {
  __shared__ double scratch[kWarp];
  __shared__ unsigned place;
  const int64_t begin = blockIdx.x * kChunk, end = begin + kChunk < P ? begin + kChunk : P;
  for (int64_t first = 0; first <= m; first += kRows) {
    double sums[kRows] = {};
    for (int turn = 0; turn < kTurns; ++turn) {
      const int64_t at = begin + (int64_t{turn} * kThreads + threadIdx.x) * kWide;
      double x[kWide], y[kWide];
      load_four<T, kAligned>(f, at, end, x);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const int64_t j = first + row;
        if (j <= m) {
          load_four<T, kAligned>(j < m ? H + j * ld : f, at, end, y);
#pragma unroll
          for (int k = 0; k < kWide; ++k) {
            sums[row] += x[k] * y[k];
          }
        }
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const double total = block_sum(sums[row], scratch);
      if (threadIdx.x == 0 && first + row <= m) {
        partial[blockIdx.x * (m + 1) + first + row] = total;
      }
    }
  }
  if (threadIdx.x == 0) {
    __threadfence(); // the partials above are seen by whichever block comes last
    place = atomicAdd(ticket, 1u);
  }
  __syncthreads();
  if (place + 1 != gridDim.x) {
    return;
  }
  __threadfence();
  for (int64_t j = 0; j <= m; ++j) {
    double sum = 0.0;
    for (int64_t block = threadIdx.x; block < gridDim.x; block += kThreads) {
      sum += partial[block * (m + 1) + j];
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) {
      out[j] = sum;
    }
  }
  if (threadIdx.x == 0) {
    *ticket = 0u;
  }
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 4) mix_kernel(
    const T* X, int64_t ldx, const T* F, int64_t ldf, const double* a, double beta, int64_t m, int64_t P, T* out) {
  const int64_t at = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kWide;
  if (at >= P) {
    return;
  }
  double sums[kWide] = {};
#pragma unroll 4
  for (int64_t j = 0; j < m; ++j) {
    const double left = a[j], right = left * beta;
    double x[kWide], f[kWide];
    load_four<T, kAligned>(X + j * ldx, at, P, x);
    load_four<T, kAligned>(F + j * ldf, at, P, f);
#pragma unroll
    for (int k = 0; k < kWide; ++k) {
      sums[k] += left * x[k] + right * f[k];
    }
  }
  if (kAligned && at + kWide <= P) {
    Four<T> four;
#pragma unroll
    for (int k = 0; k < kWide; ++k) {
      four.at[k] = static_cast<T>(sums[k]);
    }
    *reinterpret_cast<Four<T>*>(out + at) = four;
  } else {
    for (int k = 0; k < kWide && at + k < P; ++k) {
      out[at + k] = static_cast<T>(sums[k]);
    }
  }
}

template <typename T>
bool aligned(const void* start, int64_t ld) {
  return reinterpret_cast<uintptr_t>(start) % sizeof(Four<T>) == 0 && ld % kWide == 0;
}

template <typename T>
int dots(
    const void* H, int64_t ld, const void* f, int64_t m, int64_t P, double* partial, unsigned* ticket, double* out,
    cudaStream_t stream) {
  const bool wide = aligned<T>(f, 0) && (m == 0 || (aligned<T>(H, 0) && (m == 1 || ld % kWide == 0)));
  const auto kernel = wide ? dots_kernel<T, true> : dots_kernel<T, false>;
  LF_LAUNCH(
      kernel, static_cast<unsigned>(anderson_blocks(P)), kThreads, 0, stream, static_cast<const T*>(H), ld,
      static_cast<const T*>(f), m, P, partial, ticket, out);
  return launched();
}

template <typename T>
int mix(
    const void* X, int64_t ldx, const void* F, int64_t ldf, const double* a, double beta, int64_t m, int64_t P, void* out,
    cudaStream_t stream) {
  const bool wide = aligned<T>(out, 0) && (m == 0 || (aligned<T>(X, ldx) && aligned<T>(F, ldf)));
  const auto kernel = wide ? mix_kernel<T, true> : mix_kernel<T, false>;
  const int64_t per_block = int64_t{kThreads} * kWide;
  LF_LAUNCH(
      kernel, static_cast<unsigned>((P + per_block - 1) / per_block), kThreads, 0, stream, static_cast<const T*>(X), ldx,
      static_cast<const T*>(F), ldf, a, beta, m, P, static_cast<T*>(out));
  return launched();
}

} // namespace

int64_t anderson_blocks(int64_t P) {
  return P > kChunk ? (P + kChunk - 1) / kChunk : 1;
}

int anderson_dots(
    Float kind, const void* H, int64_t ld, const void* f, int64_t m, int64_t P, double* partial, unsigned* ticket,
    double* out, cudaStream_t stream) {
  return kind == Float::f32 ? dots<float>(H, ld, f, m, P, partial, ticket, out, stream)
                            : dots<double>(H, ld, f, m, P, partial, ticket, out, stream);
}

int anderson_mix(
    Float kind, const void* X, int64_t ldx, const void* F, int64_t ldf, const double* a, double beta, int64_t m,
    int64_t P, void* out, cudaStream_t stream) {
  if (P == 0) {
    return 0;
  }
  return kind == Float::f32 ? mix<float>(X, ldx, F, ldf, a, beta, m, P, out, stream)
                            : mix<double>(X, ldx, F, ldf, a, beta, m, P, out, stream);
}

} // namespace loraforge::cuda
