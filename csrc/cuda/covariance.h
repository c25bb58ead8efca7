// Rows for a Gram product, and its addition to a double accumulator, on the device. Formulas: loraforge/kernels/covariance.py.
#pragma once

#include "launch.h"

namespace loraforge::cuda {

// The numbers of the rows whose byte of mask (T,) is set, in order, and how many there are. Of more than `room` the
// first `room` are written. One launch of one block.
int cov_kept(const void* mask, int64_t T, int* kept, int64_t room, int64_t* count, cudaStream_t stream);

// out (rows, d) = x[kept] * weight[kept], row for row; x (T, d) of row stride ld. Without kept all rows in order, without
// weight no product. Where *count is given and is not `rows`, every row is NaN: a caller's number of rows that is wrong
// must not pass for data. One launch.
int cov_pack(
    Float from, const void* x, int64_t ld, const int* kept, const int64_t* count, Float weight_type, const void* weight,
    int64_t rows, int64_t d, Float to, void* out, cudaStream_t stream);

// acc (m, n) of row stride ld += the sum of the slots of chunk, (m, n) each of row stride ld_chunk, f32 or f64. Symmetric:
// only what is on and above the diagonal is read, of both; with mirror the result is copied below it. One launch.
int cov_fold(
    double* acc, int64_t ld, int64_t m, int64_t n, Float type, const void* chunk, int64_t slots, int64_t slot_stride,
    int64_t ld_chunk, bool symmetric, bool mirror, cudaStream_t stream);

} // namespace loraforge::cuda
