// SVD of many small matrices on the device. Formulas and shapes: loraforge/kernels/jacobi.py.
#pragma once

#include "launch.h"

namespace loraforge::cuda {

// Doubles of scratch that jacobi_svd needs for `count` matrices of m x n. `shared_limit` as there.
int64_t jacobi_svd_scratch(int64_t count, int64_t m, int64_t n, int64_t shared_limit);

// U (count, m, k), S (count, k), Vh (count, k, n) with k = min(m, n) of C (count, m, n), all contiguous and of one
// type, f32 or f64; m, n >= 1. info (count,): sweeps taken, -1 where `sweeps` were not enough, -2 where C is not finite
// (all results are NaN there). shared_limit: bytes of shared memory of a block, 0 for what the device has. One launch,
// a block a matrix.
int jacobi_svd(
    Float kind, const void* C, int64_t count, int64_t m, int64_t n, int sweeps, int64_t shared_limit, double* scratch,
    void* U, void* S, void* Vh, int* info, cudaStream_t stream);

} // namespace loraforge::cuda
