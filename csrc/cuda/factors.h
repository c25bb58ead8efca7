// The rank of a spectrum and the factors of a rank on the device. Formulas and shapes: loraforge/kernels/core_svd.py.
#pragma once

#include "launch.h"

namespace loraforge::cuda {

// ranks (rows,) of the energy rule on S (rows, R) with strides ld and step, f32 or f64; see pick_rank. One launch.
int pick_rank(
    Float kind, const void* S, int64_t rows, int64_t R, int64_t ld, int64_t step, double energy, int64_t least,
    int64_t most, int64_t* ranks, cudaStream_t stream);

// A matrix of any strides.
struct Strided {
  const void* data;
  int64_t row, column;
};

// B (m, rank) = U sqrt(S) and A (rank, n) = sqrt(S) Vh, contiguous, from f32 or f64, rounded to `to`. One launch.
int scale_write(
    Float kind, Float to, Strided U, const void* S, int64_t step, Strided Vh, int64_t m, int64_t n, int64_t rank,
    void* B, void* A, cudaStream_t stream);

} // namespace loraforge::cuda
