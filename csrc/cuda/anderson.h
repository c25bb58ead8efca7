// Anderson mixing on the device. Formulas and shapes: loraforge/kernels/anderson.py.
#pragma once

#include "launch.h"

namespace loraforge::cuda {

// Blocks of anderson_dots for P entries: they depend on P alone, and with them the order of every sum.
int64_t anderson_blocks(int64_t P);

// out (m + 1,) = [H f ; f . f] with H (m, P) of row stride ld. partial: (anderson_blocks(P), m + 1); ticket: 0 before and
// after. One launch.
int anderson_dots(
    Float kind, const void* H, int64_t ld, const void* f, int64_t m, int64_t P, double* partial, unsigned* ticket,
    double* out, cudaStream_t stream);

// out (P,) = sum_j a_j (X_j + beta F_j) with rows of strides ldx and ldf; out may be one of the rows. One launch.
int anderson_mix(
    Float kind, const void* X, int64_t ldx, const void* F, int64_t ldf, const double* a, double beta, int64_t m,
    int64_t P, void* out, cudaStream_t stream);

} // namespace loraforge::cuda
