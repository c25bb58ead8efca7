// v = y^T M y for 64 rows at a time, by one block. M is taken in blocks of 32 x 32, symmetrised on the way in, and only
// blocks on and right of the diagonal are multiplied; a thread has 2 rows x 4 columns of a product in registers.
#pragma once

#include "dcs.h"
#include "device.cuh"

namespace loraforge::cuda {

constexpr int kDcsThreads = 256;
constexpr int kDcsWarps = kDcsThreads / kWarp;
constexpr int kFormRows = 64;
constexpr int kFormTile = 32;
constexpr int kFormColumns = kFormTile / kDcsWarps; // of a product, a thread

// Rows [0, n) of columns [first, first + 32) of y, turned, so that lanes read neighbours; 0 beyond the ends.
using TurnedRows = double[kFormTile][kFormRows + 1];

template <typename T>
__device__ __forceinline__ void load_turned(const T* y, int64_t n, int64_t R, int64_t first, TurnedRows& to) {
  const int column = static_cast<int>(threadIdx.x) % kFormTile;
  for (int row = static_cast<int>(threadIdx.x) / kFormTile; row < kFormRows; row += kDcsThreads / kFormTile) {
    to[column][row] = row < n && first + column < R ? as_double(y[row * R + first + column]) : 0.0;
  }
}

__device__ __forceinline__ double form_entry(const void* M, Float form, int64_t at) {
  return form == Float::f64 ? static_cast<const double*>(M)[at] : static_cast<double>(static_cast<const float*>(M)[at]);
}

// to[j][i] = (M[i0 + i][j0 + j] + M[j0 + j][i0 + i]) / 2, both read along rows of M.
using FormBlock = double[kFormTile][kFormTile + 2];

__device__ __forceinline__ void load_form(
    const void* M, Float form, int64_t R, int64_t i0, int64_t j0, FormBlock& to) {
  const int lane = static_cast<int>(threadIdx.x) % kFormTile, step = kDcsThreads / kFormTile;
  for (int i = static_cast<int>(threadIdx.x) / kFormTile; i < kFormTile; i += step) {
    to[lane][i] = i0 + i < R && j0 + lane < R ? form_entry(M, form, (i0 + i) * R + j0 + lane) : 0.0;
  }
  __syncthreads();
  for (int j = static_cast<int>(threadIdx.x) / kFormTile; j < kFormTile; j += step) {
    if (i0 + lane < R && j0 + j < R) {
      to[j][lane] = 0.5 * (to[j][lane] + form_entry(M, form, (j0 + j) * R + i0 + lane));
    }
  }
}

// v[0..n) of the n <= 64 rows at y. All threads of the block take part; v may be read after the next barrier.
template <typename T>
__device__ void quadratic_rows(const T* y, int64_t n, int64_t R, const void* M, Float form, double* v) {
  __align__(16) __shared__ FormBlock block; // four neighbours are read at once
  __shared__ TurnedRows left, right;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  double total[2] = {};
  for (int64_t i0 = 0; i0 < R; i0 += kFormTile) {
    load_turned(y, n, R, i0, left);
    for (int64_t j0 = i0; j0 < R; j0 += kFormTile) {
      if (j0 != i0) {
        load_turned(y, n, R, j0, right);
      }
      load_form(M, form, R, i0, j0, block);
      __syncthreads();
      const TurnedRows& other = j0 != i0 ? right : left;
      const int columns = R - j0 < kFormTile ? static_cast<int>(R - j0) : kFormTile;
      if (i0 + warp * kFormColumns < R) {
        double product[2][kFormColumns] = {};
#pragma unroll 4
        for (int j = 0; j < columns; ++j) {
          const double y0 = other[j][lane], y1 = other[j][lane + kWarp];
#pragma unroll
          for (int c = 0; c < kFormColumns; ++c) {
            const double m = block[j][warp * kFormColumns + c];
            product[0][c] += m * y0;
            product[1][c] += m * y1;
          }
        }
        const double times = j0 != i0 ? 2.0 : 1.0;
#pragma unroll
        for (int c = 0; c < kFormColumns; ++c) {
          total[0] += times * product[0][c] * left[warp * kFormColumns + c][lane];
          total[1] += times * product[1][c] * left[warp * kFormColumns + c][lane + kWarp];
        }
      }
      __syncthreads();
    }
  }
  TurnedRows& sums = right; // free again: (warp, row)
  sums[warp][lane] = total[0];
  sums[warp][lane + kWarp] = total[1];
  __syncthreads();
  if (threadIdx.x < n) {
    double sum = 0.0;
    for (int part = 0; part < kDcsWarps; ++part) {
      sum += sums[part][threadIdx.x];
    }
    v[threadIdx.x] = sum < 0.0 ? 0.0 : sum; // keeps a NaN visible
  }
  __syncthreads();
}

} // namespace loraforge::cuda
