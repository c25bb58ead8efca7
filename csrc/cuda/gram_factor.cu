// Pivoted Cholesky of many Gram matrices: a block a Gram, a thread a column, the triangle in shared memory.
//
// Left-looking: step k takes the pivot's row of G and subtracts the k rows of the triangle that are there, so G is read
// once, from global memory, and one barrier ends a step. The triangle is then inverted in place, from its last row up.
#include "gram_factor.h"

#include <cfloat>

#include "argmax.cuh"
#include "device.cuh"

namespace loraforge::cuda {
namespace {

// Beside the triangle: norms and their inverses, twice what is left of the diagonal, scratch, pivots and their inverse.
__host__ __device__ inline int64_t small_doubles(int64_t R) {
  return 4 * R + kWarp + R;
}

struct Work {
  double* F; // (R, R): row k of the triangle in the order of G's columns; later row k of its inverse in pivot order
  double* shared;
  int R;

  __device__ __forceinline__ double* norm() const {
    return shared;
  }
  __device__ __forceinline__ double* inverse() const {
    return shared + R;
  }
  __device__ __forceinline__ double* left(int step) const {
    return shared + (2 + step % 2) * R;
  }
  __device__ __forceinline__ double* scratch() const {
    return shared + 4 * R;
  }
  __device__ __forceinline__ int* pivot() const {
    return reinterpret_cast<int*>(shared + 4 * R + kWarp);
  }
  __device__ __forceinline__ int* place() const {
    return pivot() + R;
  }
};

// Norms of the columns and a diagonal of ones, of zeros for columns of zeros. False where G is not finite.
__device__ __forceinline__ bool scale(const Work& k, const double* G) {
  bool bad = false;
  for (int j = threadIdx.x; j < k.R; j += blockDim.x) {
    const double square = G[int64_t{j} * k.R + j];
    bad = !(fabs(square) <= DBL_MAX);
    k.norm()[j] = square > 0.0 ? sqrt(square) : 0.0;
    k.inverse()[j] = square > 0.0 ? 1.0 / k.norm()[j] : 0.0;
    k.left(0)[j] = square > 0.0 ? 1.0 : 0.0;
    k.place()[j] = -1;
  }
  return !__syncthreads_or(bad);
}

// Rows of the triangle until what is left of every column is at most `cut`; their number.
__device__ __forceinline__ int triangulate(const Work& k, const double* G, double cut) {
  const int R = k.R, j = static_cast<int>(threadIdx.x);
  for (int step = 0; step < R; ++step) {
    double most;
    const int pivot = warp_argmax(k.left(step), R, most);
    if (!(most > cut)) {
      return step;
    }
    if (j < R) {
      const double left = k.left(step)[j], root = sqrt(most);
      double x = 0.0;
      if (j == pivot) {
        x = root;
        k.pivot()[step] = pivot;
        k.place()[pivot] = step;
      } else if (left >= 0.0) {
        double even = G[int64_t{pivot} * R + j] * k.inverse()[pivot] * k.inverse()[j], odd = 0.0;
        int i = 0;
#pragma unroll 4
        for (; i + 1 < step; i += 2) {
          even -= k.F[i * R + pivot] * k.F[i * R + j];
          odd -= k.F[(i + 1) * R + pivot] * k.F[(i + 1) * R + j];
        }
        if (i < step) {
          even -= k.F[i * R + pivot] * k.F[i * R + j];
        }
        x = (even + odd) / root;
      }
      k.F[step * R + j] = x;
      // Columns that are taken stay below any cut.
      k.left(step + 1)[j] = j == pivot || left < 0.0 ? -1.0 : fmax(left - x * x, 0.0);
    }
    __syncthreads();
  }
  return R;
}

// The inverse of the first `rank` pivot columns in place of the triangle; its squared Frobenius norm.
__device__ __forceinline__ double invert(const Work& k, int rank) {
  const int R = k.R, j = static_cast<int>(threadIdx.x);
  double squares = 0.0;
  for (int i = rank - 1; i >= 0; --i) {
    double x = i == j ? 1.0 : 0.0;
    if (j >= i && j < rank) {
      for (int l = i + 1; l <= j; ++l) {
        x -= k.F[i * R + k.pivot()[l]] * k.F[l * R + j];
      }
      x /= k.F[i * R + k.pivot()[i]];
      squares += x * x;
    }
    __syncthreads();
    if (j < rank) {
      k.F[i * R + j] = x;
    }
    __syncthreads();
  }
  return block_sum(squares, k.scratch());
}

__global__ void __launch_bounds__(kWidestGram) gram_factor_kernel(
    const double* G, int R, double cut, double* scratch, double* triangle, double* solve, int64_t* ranks,
    double* condition) {
  LF_DYNAMIC_SHARED(double, shared);
  const int64_t at = blockIdx.x, entries = int64_t{R} * R;
  const Work k{scratch == nullptr ? shared + small_doubles(R) : scratch + at * entries, shared, R};
  G += at * entries, triangle += at * entries, solve += at * entries;
  if (!scale(k, G)) {
    for (int e = threadIdx.x; e < entries; e += blockDim.x) {
      triangle[e] = solve[e] = NAN;
    }
    if (threadIdx.x == 0) {
      ranks[at] = 0;
      condition[at] = NAN;
    }
    return;
  }
  const int rank = triangulate(k, G, cut);
  for (int e = threadIdx.x; e < entries; e += blockDim.x) {
    triangle[e] = e / R < rank ? k.F[e] * k.norm()[e % R] : 0.0;
  }
  __syncthreads();
  const double squares = invert(k, rank);
  for (int e = threadIdx.x; e < entries; e += blockDim.x) {
    const int row = e / R, column = e % R, i = k.place()[row];
    solve[e] = i >= 0 && column < rank ? k.F[i * R + column] * k.inverse()[row] : 0.0;
  }
  if (threadIdx.x == 0) {
    ranks[at] = rank;
    condition[at] = rank == 0 ? 1.0 : sqrt(squares / rank);
  }
}

bool fits(int64_t R, int64_t limit) {
  return (R * R + small_doubles(R)) * 8 <= (limit == 0 ? most_shared() : limit);
}

} // namespace

int64_t gram_factor_scratch(int64_t count, int64_t R, int64_t shared_limit) {
  return fits(R, shared_limit) ? 0 : count * R * R;
}

int gram_factor(
    const double* G, int64_t count, int64_t R, double cut, int64_t shared_limit, double* scratch, double* triangle,
    double* solve, int64_t* rank, double* condition, cudaStream_t stream) {
  if (count == 0) {
    return 0;
  }
  const bool inside = fits(R, shared_limit);
  const size_t shared = static_cast<size_t>((small_doubles(R) + (inside ? R * R : 0)) * 8);
  const int failed = allow_most_shared(gram_factor_kernel);
  if (failed != 0) {
    return failed;
  }
  LF_LAUNCH(
      gram_factor_kernel, static_cast<unsigned>(count), static_cast<unsigned>((R + kWarp - 1) / kWarp * kWarp), shared,
      stream, G, static_cast<int>(R), cut, inside ? nullptr : scratch, triangle, solve, rank, condition);
  return launched();
}

} // namespace loraforge::cuda
