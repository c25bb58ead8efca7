// Quadratic forms and weights of many modules, modules in parallel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>

#include "../common/operands.h"
#include "dcs.h"

namespace loraforge {
namespace {

std::tuple<Tensor, Tensor> dcs_batch(
    const Tensor& Y, const Tensor& M, std::optional<Tensor> counts, double scale, double min_ess, bool excess,
    bool mad_consistent) {
  check_dcs_batch(Y, M, counts);
  const int64_t b = Y.size(0), S = Y.size(1), R = Y.size(2);
  const Tensor rows = torch::stable::contiguous(Y), forms = torch::stable::contiguous(M);
  std::optional<Tensor> filled;
  if (counts) {
    filled = torch::stable::contiguous(*counts);
  }
  const int64_t* numbers = filled ? filled->const_data_ptr<int64_t>() : nullptr;
  for (int64_t i = 0; numbers != nullptr && i < b; ++i) {
    if (numbers[i] < 0 || numbers[i] > S) {
      refuse("dcs_batch", "counts", "value " + std::to_string(numbers[i]), "0 to S = " + std::to_string(S));
    }
  }
  Tensor weights = torch::stable::new_empty(Y, {b, S}, ScalarType::Double);
  Tensor stats = torch::stable::new_empty(Y, {b, 3}, ScalarType::Double);
  double* w = weights.mutable_data_ptr<double>();
  double* report = stats.mutable_data_ptr<double>();
  const int64_t entry = Y.element_size(), form_entry = M.element_size();
  const auto* y = static_cast<const unsigned char*>(rows.const_data_ptr());
  const auto* m = static_cast<const unsigned char*>(forms.const_data_ptr());
  torch::stable::parallel_for(0, b, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = numbers != nullptr ? numbers[i] : S;
      double* row = w + i * S;
      quadratic_rows(
          y + i * S * R * entry, Y.scalar_type(), m + i * R * R * form_entry, M.scalar_type(), n, R, row);
      weights_of(row, n, {scale, min_ess, excess, mad_consistent}, row, report + 3 * i);
      std::fill(row + n, row + S, 0.0);
    }
  });
  return {weights, stats};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(loraforge, CPU, m) {
  m.impl("dcs_batch", TORCH_BOX(&dcs_batch));
}

} // namespace loraforge
