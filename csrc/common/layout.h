// Memory layout of the operands.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace loraforge {

// A matrix whose rows are contiguous (they may lie apart, as in a slice of a ring buffer); a copy only where they are not.
inline torch::stable::Tensor unit_stride(const torch::stable::Tensor& t) {
  return t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

} // namespace loraforge
