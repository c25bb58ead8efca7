// Consistency loss of hidden states on the device. Formulas: loraforge/kernels/consistency.py.
#pragma once

#include "launch.h"

namespace loraforge::cuda {

// Weights of tokens: none, or an array of bytes (0 or 1), floats or doubles.
enum class Mask : int { none = 0, bytes = 1, f32 = 2, f64 = 3 };

// P and S (tokens, width) without gaps, of the type `kind`; mask (tokens,); unit: one double that multiplies the
// threshold, or null for 1.
struct ConsistencyInput {
  Float kind;
  const void* P;
  const void* S;
  Mask mask_kind;
  const void* mask;
  int64_t tokens, width;
  int rule;
  double threshold;
  const double* unit;
};

// Blocks of consistency_forward: they depend on sizes and type alone, and with them the order of the sum.
int64_t consistency_blocks(const ConsistencyInput& input);

// out: one double. partial: (consistency_blocks,); ticket: 0 before and after. One launch.
int consistency_forward(
    const ConsistencyInput& input, double* partial, unsigned* ticket, double* out, cudaStream_t stream);

// out (tokens, width) of the type of P = grad (one double) times the gradient for P. One launch.
int consistency_backward(const ConsistencyInput& input, const double* grad, void* out, cudaStream_t stream);

} // namespace loraforge::cuda
