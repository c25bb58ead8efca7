// SVD of many small matrices: a block a matrix, everything in double, in shared memory as far as it fits.
//
// Columns are made orthogonal by one-sided Jacobi after a QR with column pivoting: C P = Q R, then R^T J = W with
// orthogonal columns, so the right vectors are the columns of P W / |W| and the left ones those of Q J. The QR sorts
// columns by size, which takes graded and rank-deficient matrices from dozens of sweeps to about eight (64 columns).
// Tall or wide: C or its transpose, so that rows >= columns. Rotations of a round work on disjoint columns, a group of
// lanes a pair, one barrier a round.
#include "jacobi_svd.h"

#include "argmax.cuh"
#include "device.cuh"
#include "small_sweeps.cuh"

namespace loraforge::cuda {
namespace {

using namespace small;

constexpr int kMost = 512; // threads of a block; two blocks share an SM where both arrays fit: 64 registers a thread

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
  const int sweeps = sweep_columns(work, most, wide ? kOrthogonal64 : kOrthogonal32);
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
  const int failed = allow_most_shared(kernel);
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
