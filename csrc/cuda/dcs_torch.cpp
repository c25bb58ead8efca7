// dcs_variance, dcs_weights and dcs_batch on CUDA tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "../common/operands.h"
#include "dcs.h"
#include "glue.h"

namespace loraforge::cuda {
namespace {

DcsForms forms_of(const Tensor& Y, const Tensor& M, int64_t R) {
  return {float_of(Y), Y.const_data_ptr(), float_of(M), M.const_data_ptr(), R};
}

Tensor variance(const Tensor& Y, const Tensor& M) {
  check_dcs_variance(Y, M);
  check_devices("dcs_variance", {{"Y", Y}, {"M", M}});
  const DeviceGuard guard(Y.get_device_index());
  const Tensor rows = torch::stable::contiguous(Y), form = torch::stable::contiguous(M);
  Tensor out = torch::stable::new_empty(Y, {Y.size(0)}, ScalarType::Double);
  check_launch(
      "dcs_variance",
      dcs_variance(
          {1, Y.size(0), nullptr}, forms_of(rows, form, Y.size(1)), out.mutable_data_ptr<double>(), stream_of(Y)));
  return out;
}

std::tuple<Tensor, Tensor> weights(
    const Tensor& V, double scale, double min_ess, bool excess, bool mad_consistent) {
  check_dcs_weights(V);
  check_devices("dcs_weights", {{"V", V}});
  const DeviceGuard guard(V.get_device_index());
  const Tensor variances = torch::stable::contiguous(V);
  Tensor w = torch::stable::new_empty(V, {V.size(0)}, ScalarType::Double);
  Tensor stats = torch::stable::new_empty(V, {3}, ScalarType::Double);
  check_launch(
      "dcs_weights",
      dcs_weights(
          {1, V.size(0), nullptr}, variances.const_data_ptr<double>(), {scale, min_ess, excess, mad_consistent},
          w.mutable_data_ptr<double>(), stats.mutable_data_ptr<double>(), stream_of(V)));
  return {w, stats};
}

std::tuple<Tensor, Tensor> batch(
    const Tensor& Y, const Tensor& M, std::optional<Tensor> counts, double scale, double min_ess, bool excess,
    bool mad_consistent) {
  check_dcs_batch(Y, M, counts);
  check_devices("dcs_batch", {{"Y", Y}, {"M", M}, {"counts", counts.value_or(Y)}});
  const DeviceGuard guard(Y.get_device_index());
  const Tensor rows = torch::stable::contiguous(Y), form = torch::stable::contiguous(M);
  std::optional<Tensor> numbers;
  if (counts) {
    numbers = torch::stable::contiguous(*counts);
  }
  Tensor w = torch::stable::new_empty(Y, {Y.size(0), Y.size(1)}, ScalarType::Double);
  Tensor stats = torch::stable::new_empty(Y, {Y.size(0), 3}, ScalarType::Double);
  check_launch(
      "dcs_batch",
      dcs_batch(
          {Y.size(0), Y.size(1), numbers ? numbers->const_data_ptr<int64_t>() : nullptr},
          forms_of(rows, form, Y.size(2)), {scale, min_ess, excess, mad_consistent}, w.mutable_data_ptr<double>(),
          stats.mutable_data_ptr<double>(), stream_of(Y)));
  return {w, stats};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(loraforge, CUDA, m) {
  m.impl("dcs_variance", TORCH_BOX(&variance));
  m.impl("dcs_weights", TORCH_BOX(&weights));
  m.impl("dcs_batch", TORCH_BOX(&batch));
}

} // namespace loraforge::cuda
