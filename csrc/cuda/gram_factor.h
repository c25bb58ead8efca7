// Pivoted Cholesky of many Gram matrices on the device. Formulas and shapes: loraforge/kernels/gram_cholesky.py.
#pragma once

#include "launch.h"

namespace loraforge::cuda {

constexpr int64_t kWidestGram = 1024; // a thread a column

// Doubles of scratch that gram_factor needs: for triangles that do not fit into a block's `shared_limit` bytes of
// shared memory (0 for what the device has).
int64_t gram_factor_scratch(int64_t count, int64_t R, int64_t shared_limit);

// triangle and solve (count, R, R), rank and condition (count,) of G (count, R, R), all contiguous; a pivot up to `cut`
// ends it; see gram_factor. R from 1 to kWidestGram. One launch, a block a Gram.
int gram_factor(
    const double* G, int64_t count, int64_t R, double cut, int64_t shared_limit, double* scratch, double* triangle,
    double* solve, int64_t* rank, double* condition, cudaStream_t stream);

} // namespace loraforge::cuda
