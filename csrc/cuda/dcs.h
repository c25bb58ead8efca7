// Dynamic calibration sampling on the device: quadratic forms of tokens and the weights that follow from them.
// Formulas: loraforge/kernels/dcs.py.
#pragma once

#include "launch.h"

namespace loraforge::cuda {

// b modules of S rows each, of which the first counts[i] count (all where counts is null).
struct DcsRows {
  int64_t b, S;
  const int64_t* counts;
};

// Y (b, S, R) of the type `kind` and M (b, R, R) of the type `form`, float or double; without gaps.
struct DcsForms {
  Float kind;
  const void* Y;
  Float form;
  const void* M;
  int64_t R;
};

struct DcsSettings {
  double scale, min_ess;
  bool excess, mad_consistent;
};

// v (b, S) = y^T M y, clamped at 0, of the rows that count; the others are left alone. One launch.
int dcs_variance(const DcsRows& rows, const DcsForms& forms, double* v, cudaStream_t stream);

// w (b, S) of variances V (b, S), which may be the same memory, 0 in rows that do not count, and stats (b, 3): sigma,
// tau, share of effective samples. NaN in both where a variance is negative or not finite or a count is not in 0 to S.
// One launch.
int dcs_weights(
    const DcsRows& rows, const double* V, const DcsSettings& settings, double* w, double* stats, cudaStream_t stream);

// Both at once: one launch where there are enough modules to fill a GPU with a block each, else two.
int dcs_batch(
    const DcsRows& rows, const DcsForms& forms, const DcsSettings& settings, double* w, double* stats,
    cudaStream_t stream);

} // namespace loraforge::cuda
