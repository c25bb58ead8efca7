// Parts of the DCS operators: one module at a time, for the operators of one module and that of many.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace loraforge {

struct DcsOptions {
  double scale;
  double min_ess;
  bool excess;
  bool mad_consistent;
};

// v (S,) = y^T M y of the rows of Y (S, R), clamped at 0; M (R, R) float or double. Both contiguous.
void quadratic_rows(
    const void* Y, torch::headeronly::ScalarType dtype, const void* M, torch::headeronly::ScalarType form, int64_t S,
    int64_t R, double* v);

// Weights w (S,) of variances v (S,), which may be the same memory, and stats: sigma, tau, share of effective samples.
// All of them are NaN where a variance is negative or not finite.
void weights_of(const double* v, int64_t S, const DcsOptions& options, double* w, double* stats);

} // namespace loraforge
