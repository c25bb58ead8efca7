// One-sided Jacobi on the columns of a matrix that a block works on: rotations, sorting, vectors of null directions.
#pragma once

#include "small_qr.cuh"

namespace loraforge::cuda::small {

__device__ __forceinline__ void rotate(double* x, double* y, const Rotation& turn, int lane, int step, int length) {
  for (int i = lane; i < length; i += step) {
    const double a = x[i], b = y[i];
    x[i] = a + turn.s * (b - turn.tau * a);
    y[i] = b - turn.s * (a + turn.tau * b);
  }
}

// Sweeps over all pairs until one turns nothing; its number, or -1 where `most` are not enough.
__device__ __forceinline__ int sweep_columns(const Work& k, int most, double tolerance) {
  const int lane = static_cast<int>(threadIdx.x) % kGroup, groups = static_cast<int>(blockDim.x) / kGroup;
  const int slots = k.n + k.n % 2, pairs = slots / 2;
  for (int sweep = 1; sweep <= most; ++sweep) {
    norms(k, k.n); // between sweeps they are updated and drift
    int turned = 0;
    for (int round = 0; round < slots - 1; ++round) {
      for (int base = 0; base < pairs; base += groups) {
        const int pair = base + static_cast<int>(threadIdx.x) / kGroup;
        int p = k.n, q = k.n;
        if (pair < pairs) {
          pair_of(slots, round, pair, p, q);
        }
        bool live = p < k.n && q < k.n;
        double big = live ? k.w()[p] : 0.0, small = live ? k.w()[q] : 0.0;
        if (big < small) {
          const double size = big;
          const int column = p;
          big = small, small = size;
          p = q, q = column;
        }
        live = live && small > kNothing;
        double *x = k.A + p * k.ld, *y = k.A + q * k.ld, dot = 0.0;
        for (int i = lane; live && i < k.n; i += kGroup) {
          dot += x[i] * y[i];
        }
        dot = group_sum(dot);
        __syncwarp(); // a shuffle orders no memory: all lanes have read the norms before one of them writes
        if (live && fabs(dot) > tolerance * sqrt(big * small)) {
          const Rotation turn = rotation_of(big, small, dot);
          rotate(x, y, turn, lane, kGroup, k.n);
          rotate(k.V + p * k.ld, k.V + q * k.ld, turn, lane, kGroup, k.n);
          if (lane == 0) {
            k.w()[p] = big + turn.shift;
            k.w()[q] = fmax(small - turn.shift, 0.0);
          }
          turned = 1;
        }
      }
      __syncthreads();
    }
    if (!__syncthreads_or(turned)) {
      return sweep;
    }
  }
  return -1;
}

// Norms of the columns, their places in descending order, and columns of norm 1 where there is one: elsewhere w is 0.
__device__ __forceinline__ void sort_columns(const Work& k) {
  norms(k, k.n);
#pragma unroll 1
  for (int j = threadIdx.x; j < k.n; j += blockDim.x) {
    int place = 0;
    for (int other = 0; other < k.n; ++other) {
      place += k.w()[other] > k.w()[j] || (k.w()[other] == k.w()[j] && other < j);
    }
    k.from()[place] = j;
  }
  __syncthreads();
#pragma unroll 1
  for (int j = threadIdx.x; j < k.n; j += blockDim.x) {
    k.w()[j] = k.w()[j] > kNothing ? sqrt(k.w()[j]) : 0.0;
  }
  __syncthreads();
#pragma unroll 1
  for (int e = threadIdx.x; e < k.n * k.n; e += blockDim.x) {
    const int j = e / k.n;
    if (k.w()[j] > 0.0) {
      k.A[j * k.ld + e % k.n] /= k.w()[j];
    }
  }
  __syncthreads();
}

// Fills the columns of norm 0 so that all are orthonormal, and marks them by w = -1: the unit vector that the others
// cover least, made orthogonal to them twice.
__device__ __forceinline__ void complete(const Work& k) {
  const int lane = static_cast<int>(threadIdx.x) % kGroup, groups = static_cast<int>(blockDim.x) / kGroup;
  double *open = k.head(), *dots = k.w() + k.n; // open (n,): share of each unit vector that is not covered
#pragma unroll 1
  for (int i = threadIdx.x; i < k.n; i += blockDim.x) {
    double covered = 0.0;
    for (int c = 0; c < k.n; ++c) {
      covered += k.w()[c] > 0.0 ? k.A[c * k.ld + i] * k.A[c * k.ld + i] : 0.0;
    }
    open[i] = fmax(1.0 - covered, 0.0);
  }
  __syncthreads();
  for (int j = 0; j < k.n; ++j) {
    if (k.w()[j] != 0.0) {
      continue; // the same for all threads: w changes between barriers only
    }
    double share;
    const int unit = warp_argmax(open, k.n, share);
    double* x = k.A + j * k.ld;
#pragma unroll 1
    for (int i = threadIdx.x; i < k.n; i += blockDim.x) {
      double sum = i == unit ? 1.0 : 0.0;
      for (int c = 0; c < k.n; ++c) {
        sum -= k.w()[c] != 0.0 ? k.A[c * k.ld + unit] * k.A[c * k.ld + i] : 0.0;
      }
      x[i] = sum;
    }
    __syncthreads();
    for (int base = 0; base < k.n; base += groups) {
      const int c = base + static_cast<int>(threadIdx.x) / kGroup;
      double dot = 0.0;
      for (int i = lane; c < k.n && i < k.n; i += kGroup) {
        dot += k.w()[c] != 0.0 ? k.A[c * k.ld + i] * x[i] : 0.0;
      }
      dot = group_sum(dot);
      if (lane == 0 && c < k.n) {
        dots[c] = dot;
      }
    }
    __syncthreads();
    double size = 0.0;
#pragma unroll 1
    for (int i = threadIdx.x; i < k.n; i += blockDim.x) {
      for (int c = 0; c < k.n; ++c) {
        x[i] -= k.w()[c] != 0.0 ? dots[c] * k.A[c * k.ld + i] : 0.0;
      }
      size += x[i] * x[i];
    }
    size = sqrt(block_sum(size, k.scratch()));
#pragma unroll 1
    for (int i = threadIdx.x; i < k.n; i += blockDim.x) {
      x[i] /= size;
      open[i] = fmax(open[i] - x[i] * x[i], 0.0);
    }
    if (threadIdx.x == 0) {
      k.w()[j] = -1.0;
    }
    __syncthreads();
  }
}

} // namespace loraforge::cuda::small
