// consistency_forward and consistency_backward on CUDA tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>

#include "../common/consistency.h"
#include "../common/operands.h"
#include "consistency.h"
#include "glue.h"

namespace loraforge::cuda {
namespace {

// Contiguous operands, kept alive beside the pointers to them.
struct Given {
  Tensor P, S;
  std::optional<Tensor> mask;
  ConsistencyInput input;
};

Mask mask_kind(const Tensor& mask) {
  switch (mask.scalar_type()) {
    case ScalarType::Bool:
      return Mask::bytes;
    case ScalarType::Float:
      return Mask::f32;
    default:
      return Mask::f64;
  }
}

Given checked(
    const char* op, const Tensor& P, const Tensor& S, const std::optional<Tensor>& mask, int64_t rule,
    double threshold, const std::optional<Tensor>& unit) {
  check_consistency(op, P, S, mask, rule, unit);
  check_devices(op, {{"P", P}, {"S", S}, {"mask", mask.value_or(P)}, {"unit", unit.value_or(P)}});
  const DeviceGuard guard(P.get_device_index());
  Given given{torch::stable::contiguous(P), torch::stable::contiguous(S), std::nullopt, {}};
  if (mask) {
    given.mask = torch::stable::contiguous(*mask);
  }
  given.input = {
      float_of(P),
      given.P.const_data_ptr(),
      given.S.const_data_ptr(),
      mask ? mask_kind(*mask) : Mask::none,
      mask ? given.mask->const_data_ptr() : nullptr,
      P.size(0),
      P.size(1),
      static_cast<int>(rule),
      threshold,
      unit ? unit->const_data_ptr<double>() : nullptr};
  return given;
}

Tensor forward(
    const Tensor& P, const Tensor& S, std::optional<Tensor> mask, int64_t rule, double threshold,
    std::optional<Tensor> unit) {
  const Given given = checked("consistency_forward", P, S, mask, rule, threshold, unit);
  const DeviceGuard guard(P.get_device_index());
  Tensor partial = torch::stable::new_empty(P, {consistency_blocks(given.input)}, ScalarType::Double);
  Tensor ticket = torch::stable::new_zeros(P, {1}, ScalarType::Int);
  Tensor out = torch::stable::new_empty(P, {}, ScalarType::Double);
  check_launch(
      "consistency_forward",
      consistency_forward(
          given.input, partial.mutable_data_ptr<double>(), static_cast<unsigned*>(ticket.mutable_data_ptr()),
          out.mutable_data_ptr<double>(), stream_of(P)));
  return out;
}

Tensor backward(
    const Tensor& grad, const Tensor& P, const Tensor& S, std::optional<Tensor> mask, int64_t rule, double threshold,
    std::optional<Tensor> unit) {
  const Given given = checked("consistency_backward", P, S, mask, rule, threshold, unit);
  check_dim("consistency_backward", "grad", grad, 0, "()");
  check_devices("consistency_backward", {{"P", P}, {"grad", grad}});
  check_dtype("consistency_backward", "grad", grad, {ScalarType::Double});
  const DeviceGuard guard(P.get_device_index());
  Tensor out = torch::stable::new_empty(P, {P.size(0), P.size(1)}, P.scalar_type());
  check_launch(
      "consistency_backward",
      consistency_backward(given.input, grad.const_data_ptr<double>(), out.mutable_data_ptr(), stream_of(P)));
  return out;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(loraforge, CUDA, m) {
  m.impl("consistency_forward", TORCH_BOX(&forward));
  m.impl("consistency_backward", TORCH_BOX(&backward));
}

} // namespace loraforge::cuda
