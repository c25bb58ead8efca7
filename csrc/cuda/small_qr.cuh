// Householder QR with column pivoting of a matrix that a block works on, and its reflectors applied again.
#pragma once

#include <cfloat>

#include "../common/jacobi.h"
#include "argmax.cuh"
#include "device.cuh"

namespace loraforge::cuda::small {

constexpr int kGroup = 16; // lanes that work on a pair: the 32 pairs of 64 columns are all in work at once

// Entry `at` of float32 or float64, by a flag and not by a template: two kernels to compile, and not four.
__device__ __forceinline__ double load(const void* from, bool wide, int64_t at) {
  return wide ? static_cast<const double*>(from)[at] : static_cast<double>(static_cast<const float*>(from)[at]);
}

__device__ __forceinline__ void store(void* to, bool wide, int64_t at, double x) {
  if (wide) {
    static_cast<double*>(to)[at] = x;
  } else {
    static_cast<float*>(to)[at] = static_cast<float>(x);
  }
}

// What a block works on. The small arrays follow each other in shared memory and are found by their place, which keeps
// their addresses out of the registers.
struct Work {
  double *A, *V;     // columns of ld entries
  double *shared;
  double *reflector; // (n, rows) in global memory
  int rows, n, ld;

  // (2, n) squared norms
  __device__ __forceinline__ double* w() const {
    return shared;
  }
  // (n,) diagonal of R; later what is open of each row
  __device__ __forceinline__ double* head() const {
    return shared + 2 * n;
  }
  // (n,) of the reflectors
  __device__ __forceinline__ double* coef() const {
    return shared + 3 * n;
  }
  // A value a warp.
  __device__ __forceinline__ double* scratch() const {
    return shared + 4 * n;
  }
  // (n,) columns in the order of the QR
  __device__ __forceinline__ int* order() const {
    return reinterpret_cast<int*>(shared + 4 * n + kWarp);
  }
  // (n,) columns in the order of the spectrum
  __device__ __forceinline__ int* from() const {
    return order() + n;
  }
};

__host__ __device__ inline int odd(int rows) {
  return rows | 1; // of doubles: rows of a column-major array do not share a bank
}

__host__ __device__ inline int64_t small_doubles(int n) {
  return 4 * n + kWarp + (2 * n + 1) / 2;
}

__device__ __forceinline__ double group_sum(double x) {
#pragma unroll
  for (int offset = kGroup / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kFullWarp, x, offset);
  }
  return x;
}

__device__ __forceinline__ double block_max(double x, double* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x = fmax(x, __shfl_xor_sync(kFullWarp, x, offset));
  }
  if (lane == 0) {
    scratch[warp] = x;
  }
  __syncthreads();
  x = lane < static_cast<int>(blockDim.x) / kWarp ? scratch[lane] : 0.0;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x = fmax(x, __shfl_xor_sync(kFullWarp, x, offset));
  }
  __syncthreads();
  return x;
}

// Columns of C, or of its transpose, times the power of two that takes the largest entry into [1/2, 1). False where an
// entry is not finite.
__device__ __forceinline__ bool load_columns(
    const Work& k, const void* C, bool wide, int64_t begin, bool flipped, int& exponent) {
  const int entries = k.rows * k.n;
  double top = 0.0;
  bool bad = false;
#pragma unroll 1
  for (int e = threadIdx.x; e < entries; e += blockDim.x) {
    const double x = load(C, wide, begin + e);
    bad |= !(fabs(x) <= DBL_MAX);
    top = fmax(top, fabs(x));
    k.A[flipped ? e / k.rows * k.ld + e % k.rows : e % k.n * k.ld + e / k.n] = x;
  }
  top = block_max(top, k.scratch());
  if (__syncthreads_or(bad)) {
    return false;
  }
  exponent = 0;
  if (top > 0.0) {
    frexp(top, &exponent);
  }
#pragma unroll 1
  for (int e = threadIdx.x; e < entries; e += blockDim.x) {
    double& x = k.A[flipped ? e / k.rows * k.ld + e % k.rows : e % k.n * k.ld + e / k.n];
    x = scalbn(x, -exponent);
  }
  __syncthreads();
  return true;
}

// Squared norms of the first `length` entries of every column, into k.w().
__device__ __forceinline__ void norms(const Work& k, int length) {
  const int lane = static_cast<int>(threadIdx.x) % kGroup, groups = static_cast<int>(blockDim.x) / kGroup;
  for (int base = 0; base < k.n; base += groups) {
    const int j = base + static_cast<int>(threadIdx.x) / kGroup;
    double sum = 0.0;
    for (int i = lane; j < k.n && i < length; i += kGroup) {
      sum += k.A[j * k.ld + i] * k.A[j * k.ld + i];
    }
    sum = group_sum(sum);
    if (lane == 0 && j < k.n) {
      k.w()[j] = sum;
    }
  }
  __syncthreads();
}

// Householder QR with column pivoting. Reflector i is I - coef v v^T with v from row i of column order[i] on, where v's
// first entry is kept in k.reflector; what R has above the diagonal lies in the columns, its diagonal in k.head().
// Returns the number of reflectors: after them nothing is left.
__device__ __forceinline__ int pivoted_qr(const Work& k) {
  const int lane = static_cast<int>(threadIdx.x) % kGroup, groups = static_cast<int>(blockDim.x) / kGroup;
  norms(k, k.rows);
  for (int step = 0; step < k.n; ++step) {
    // Norms are read from one row of w and written to the other: one barrier a step.
    const double* now = k.w() + step % 2 * k.n;
    double* next = k.w() + (step + 1) % 2 * k.n;
    double left;
    const int pivot = warp_argmax(now, k.n, left);
    if (!(left > kNothing)) {
      if (threadIdx.x == 0) {
        for (int j = 0, at = step; j < k.n; ++j) {
          if (now[j] >= 0.0) {
            k.order()[at++] = j;
          }
        }
      }
      __syncthreads();
      return step;
    }
    const double* v = k.A + pivot * k.ld;
    const double size = sqrt(left), first = v[step], beta = first > 0.0 ? -size : size, lead = first - beta;
    const double coef = 1.0 / (size * (size + fabs(first)));
    if (threadIdx.x == 0) {
      k.order()[step] = pivot;
      k.head()[step] = beta;
      k.coef()[step] = coef;
      k.reflector[step * k.rows + step] = lead;
    }
    for (int base = 0; base < k.n; base += groups) {
      const int j = base + static_cast<int>(threadIdx.x) / kGroup;
      const bool live = j < k.n && j != pivot && now[j] >= 0.0;
      double* a = k.A + j * k.ld;
      double dot = live && lane == 0 ? lead * a[step] : 0.0, sum = 0.0;
      for (int i = step + 1 + lane; live && i < k.rows; i += kGroup) {
        dot += v[i] * a[i];
      }
      dot = group_sum(dot) * coef;
      if (live && lane == 0) {
        a[step] -= dot * lead;
      }
      for (int i = step + 1 + lane; live && i < k.rows; i += kGroup) {
        const double x = a[i] - dot * v[i];
        a[i] = x;
        sum += x * x;
      }
      sum = group_sum(sum);
      if (lane == 0 && j < k.n) {
        next[j] = live ? sum : -1.0;
      }
    }
    __syncthreads();
  }
  return k.n;
}

// Keeps the reflectors in global memory, puts R^T (lower triangular, zero from column `rank` on) into A and I into V.
__device__ __forceinline__ void turn_over(const Work& k, int rank) {
#pragma unroll 1
  for (int e = threadIdx.x; e < rank * k.rows; e += blockDim.x) {
    const int j = e / k.rows, i = e % k.rows;
    if (i > j) {
      k.reflector[e] = k.A[k.order()[j] * k.ld + i];
    }
  }
#pragma unroll 1
  for (int e = threadIdx.x; e < k.n * k.n; e += blockDim.x) {
    const int j = e / k.n, i = e % k.n;
    const double below = i > j ? k.A[k.order()[i] * k.ld + j] : i == j ? k.head()[j] : 0.0;
    k.V[j * k.ld + i] = j < rank && i >= j ? below : 0.0;
  }
  __syncthreads();
#pragma unroll 1
  for (int e = threadIdx.x; e < k.n * k.rows; e += blockDim.x) {
    const int j = e / k.rows, i = e % k.rows;
    if (i < k.n) {
      k.A[j * k.ld + i] = k.V[j * k.ld + i];
    }
    k.V[j * k.ld + i] = i == j ? 1.0 : 0.0;
  }
  __syncthreads();
}

// V <- Q [V; 0], with the reflectors brought into A.
__device__ __forceinline__ void reflect(const Work& k, int rank) {
  const int lane = static_cast<int>(threadIdx.x) % kGroup, groups = static_cast<int>(blockDim.x) / kGroup;
  for (int e = threadIdx.x; e < rank * k.rows; e += blockDim.x) {
    const int j = e / k.rows, i = e % k.rows;
    if (i >= j) {
      k.A[j * k.ld + i] = k.reflector[e];
    }
  }
  __syncthreads();
  for (int base = 0; base < k.n; base += groups) {
    const int j = base + static_cast<int>(threadIdx.x) / kGroup;
    double* x = k.V + j * k.ld;
    for (int r = rank - 1; r >= 0; --r) {
      const double* v = k.A + r * k.ld;
      double dot = 0.0;
      for (int i = r + lane; j < k.n && i < k.rows; i += kGroup) {
        dot += v[i] * x[i];
      }
      dot = group_sum(dot) * k.coef()[r];
      for (int i = r + lane; j < k.n && i < k.rows; i += kGroup) {
        x[i] -= dot * v[i];
      }
      __syncwarp();
    }
  }
  __syncthreads();
}

} // namespace loraforge::cuda::small
