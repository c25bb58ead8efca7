// gram_factor on CUDA tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "glue.h"
#include "gram_factor.h"

namespace loraforge::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> factor(const Tensor& G, double cut) {
  check_dim("gram_factor", "G", G, 3, "(b, R, R)");
  check_devices("gram_factor", {{"G", G}});
  check_dtype("gram_factor", "G", G, {ScalarType::Double});
  const int64_t b = G.size(0), R = G.size(1);
  check_size("gram_factor", "G", G, 2, R, "R");
  const DeviceGuard guard(G.get_device_index());
  if (R > kWidestGram) {
    refuse("gram_factor", "G", "shape " + shape_of(G), "at most " + std::to_string(kWidestGram) + " columns");
  }
  const Tensor grams = torch::stable::contiguous(G);
  Tensor triangle = torch::stable::new_empty(G, {b, R, R}), solve = torch::stable::new_empty(G, {b, R, R});
  Tensor rank = torch::stable::new_zeros(G, {b}, ScalarType::Long);
  Tensor condition = torch::stable::new_empty(G, {b});
  if (R == 0) {
    torch::stable::fill_(condition, 1.0);
    return {triangle, solve, rank, condition};
  }
  Tensor scratch = torch::stable::new_empty(G, {gram_factor_scratch(b, R, 0)});
  check_launch(
      "gram_factor",
      gram_factor(
          grams.const_data_ptr<double>(), b, R, cut, 0, scratch.mutable_data_ptr<double>(),
          triangle.mutable_data_ptr<double>(), solve.mutable_data_ptr<double>(),
          rank.mutable_data_ptr<int64_t>(), condition.mutable_data_ptr<double>(), stream_of(G)));
  return {triangle, solve, rank, condition};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(loraforge, CUDA, m) {
  m.impl("gram_factor", TORCH_BOX(&factor));
}

} // namespace loraforge::cuda
