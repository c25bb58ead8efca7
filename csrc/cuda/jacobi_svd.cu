// SVD of many small matrices: a block a matrix, everything in double, in shared memory as far as it fits.
//
// Columns are made orthogonal by one-sided Jacobi after a QR with column pivoting: C P = Q R, then R^T J = W with
// orthogonal columns, so the right vectors are the columns of P W / |W| and the left ones those of Q J. The QR sorts
// columns by size, which takes graded and rank-deficient matrices from dozens of sweeps to about eight (64 columns).
// Tall or wide: C or its transpose, so that rows >= columns. Rotations of a round work on disjoint columns, a group of
// lanes a pair, one barrier a round.
#include "jacobi_svd.h"

#include <cfloat>

#include "../common/jacobi.h"
#include "argmax.cuh"

namespace loraforge::cuda {
namespace {

constexpr int kGroup = 16; // lanes that work on a pair: the 32 pairs of 64 columns are all in work at once
constexpr int kMost = 512; // threads of a block; two blocks share an SM where both arrays fit: 64 registers a thread

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

__device__ __forceinline__ void rotate(double* x, double* y, const Rotation& turn, int lane, int step, int length) {
  for (int i = lane; i < length; i += step) {
    const double a = x[i], b = y[i];
    x[i] = a + turn.s * (b - turn.tau * a);
    y[i] = b - turn.s * (a + turn.tau * b);
  }
}

// Sweeps over all pairs until one turns nothing; its number, or -1 where `most` are not enough.
__device__ __forceinline__ int jacobi(const Work& k, int most, double tolerance) {
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

// Where the two arrays of a block lie: `inside` of them in shared memory, the others behind the reflectors in its part
// of the scratch.
struct Plan {
  int inside;
  int64_t per_matrix; // doubles of scratch
  size_t shared;
};

// kInside 2: both arrays in shared memory, as the compiler is told; 0: where the plan says.
template <int kInside>
__device__ __forceinline__ Work lay_out(double* shared, double* scratch, const Plan& plan, int rows, int n) {
  Work k;
  k.rows = rows, k.n = n, k.ld = odd(rows);
  k.shared = shared;
  k.reflector = scratch + blockIdx.x * plan.per_matrix;
  const int64_t array = int64_t{n} * k.ld;
  double *inner = shared + small_doubles(n), *outer = k.reflector + int64_t{n} * rows;
  k.A = kInside == 2 || plan.inside != 0 ? inner : outer + array;
  k.V = kInside == 2 ? inner + array : outer;
  return k;
}

struct Result {
  void *U, *S, *Vh;
  int* info;
};

// What a matrix that is not finite gives.
__device__ __forceinline__ void write_nan(const Result& to, bool wide, int m, int n, int k) {
  const int64_t at = blockIdx.x;
#pragma unroll 1
  for (int e = threadIdx.x; e < m * k; e += blockDim.x) {
    store(to.U, wide, at * m * k + e, NAN);
  }
#pragma unroll 1
  for (int e = threadIdx.x; e < k * n; e += blockDim.x) {
    store(to.Vh, wide, at * k * n + e, NAN);
  }
#pragma unroll 1
  for (int e = threadIdx.x; e < k; e += blockDim.x) {
    store(to.S, wide, at * k + e, NAN);
  }
  if (threadIdx.x == 0) {
    to.info[at] = -2;
  }
}

template <int kInside>
__global__ void __launch_bounds__(kMost, kInside == 2 ? 2 : 1) jacobi_svd_kernel(
    const void* C, bool wide, int m, int n, int most, Plan plan, double* scratch, Result to) {
  LF_DYNAMIC_SHARED(double, shared);
  const int64_t at = blockIdx.x;
  const bool flipped = m < n;
  const int rows = flipped ? n : m, k = flipped ? m : n;
  const Work work = lay_out<kInside>(shared, scratch, plan, rows, k);
  int exponent;
  if (!load_columns(work, C, wide, at * m * n, flipped, exponent)) {
    write_nan(to, wide, m, n, k);
    return;
  }
  const int rank = pivoted_qr(work);
  turn_over(work, rank);
  const int sweeps = jacobi(work, most, wide ? kOrthogonal64 : kOrthogonal32);
  sort_columns(work);
  complete(work);
  // The right vectors, or the left ones of a wide matrix, are in A by the QR's order of rows.
#pragma unroll 1
  for (int e = threadIdx.x; e < k * k; e += blockDim.x) {
    const int place = flipped ? e % k : e / k, i = flipped ? e / k : e % k;
    const double x = work.A[work.from()[place] * work.ld + i];
    const int row = work.order()[i];
    store(flipped ? to.U : to.Vh, wide, at * k * k + (flipped ? row * k + place : place * k + row), x);
  }
#pragma unroll 1
  for (int place = threadIdx.x; place < k; place += blockDim.x) {
    store(to.S, wide, at * k + place, scalbn(fmax(work.w()[work.from()[place]], 0.0), exponent));
  }
  if (threadIdx.x == 0) {
    to.info[at] = sweeps;
  }
  __syncthreads();
  reflect(work, rank);
#pragma unroll 1
  for (int e = threadIdx.x; e < rows * k; e += blockDim.x) {
    const int place = flipped ? e / rows : e % k, i = flipped ? e % rows : e / k;
    store(flipped ? to.Vh : to.U, wide, at * rows * k + e, work.V[work.from()[place] * work.ld + i]);
  }
}

Plan plan_of(int64_t m, int64_t n, int64_t limit) {
  limit = limit == 0 ? most_shared() : limit;
  const int rows = static_cast<int>(m < n ? n : m), k = static_cast<int>(m < n ? m : n);
  const int64_t array = int64_t{k} * odd(rows), small = small_doubles(k);
  const int inside = (small + 2 * array) * 8 <= limit ? 2 : (small + array) * 8 <= limit ? 1 : 0;
  return {inside, int64_t{k} * rows + (2 - inside) * array, static_cast<size_t>((small + inside * array) * 8)};
}

template <int kInside>
int decompose(
    const void* C, bool wide, int64_t count, int m, int n, int sweeps, const Plan& plan, double* scratch,
    const Result& to, cudaStream_t stream) {
  const auto kernel = jacobi_svd_kernel<kInside>;
  const int failed = static_cast<int>(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared)));
  if (failed != 0) {
    return failed;
  }
  const int k = m < n ? m : n, lanes = (k + 1) / 2 * kGroup, threads = lanes < kMost ? (lanes + 31) / 32 * 32 : kMost;
  LF_LAUNCH(
      kernel, static_cast<unsigned>(count), static_cast<unsigned>(threads), plan.shared, stream, C, wide, m, n, sweeps,
      plan, scratch, to);
  return launched();
}

} // namespace

int64_t jacobi_svd_scratch(int64_t count, int64_t m, int64_t n, int64_t shared_limit) {
  return count * plan_of(m, n, shared_limit).per_matrix;
}

int jacobi_svd(
    Float kind, const void* C, int64_t count, int64_t m, int64_t n, int sweeps, int64_t shared_limit, double* scratch,
    void* U, void* S, void* Vh, int* info, cudaStream_t stream) {
  if (count == 0) {
    return 0;
  }
  const Plan plan = plan_of(m, n, shared_limit);
  const auto run = plan.inside == 2 ? decompose<2> : decompose<0>;
  const bool wide = kind == Float::f64;
  const Result to{U, S, Vh, info};
  return run(C, wide, count, static_cast<int>(m), static_cast<int>(n), sweeps, plan, scratch, to, stream);
}

} // namespace loraforge::cuda
