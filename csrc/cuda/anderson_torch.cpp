// anderson_dots and anderson_mix on CUDA tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/layout.h"
#include "../common/operands.h"
#include "anderson.h"
#include "glue.h"

namespace loraforge::cuda {
namespace {

Tensor dots(const Tensor& H, const Tensor& f) {
  check_anderson_dots(H, f);
  check_devices("anderson_dots", {{"H", H}, {"f", f}});
  const DeviceGuard guard(H.get_device_index());
  const Tensor rows = unit_stride(H), vector = torch::stable::contiguous(f);
  const int64_t m = H.size(0), P = H.size(1);
  Tensor partial = torch::stable::new_empty(f, {anderson_blocks(P), m + 1}, ScalarType::Double);
  Tensor ticket = torch::stable::new_zeros(f, {1}, ScalarType::Int);
  Tensor out = torch::stable::new_empty(f, {m + 1}, ScalarType::Double);
  check_launch(
      "anderson_dots",
      anderson_dots(
          float_of(H), rows.const_data_ptr(), rows.stride(0), vector.const_data_ptr(), m, P,
          partial.mutable_data_ptr<double>(), static_cast<unsigned*>(ticket.mutable_data_ptr()),
          out.mutable_data_ptr<double>(), stream_of(H)));
  return out;
}

void mix(const Tensor& X, const Tensor& F, const Tensor& a, double beta, Tensor out) {
  check_anderson_mix(X, F, a, out);
  check_devices("anderson_mix", {{"X", X}, {"F", F}, {"a", a}, {"out", out}});
  const DeviceGuard guard(X.get_device_index());
  const Tensor x = unit_stride(X), f = unit_stride(F), weights = torch::stable::contiguous(a);
  Tensor target = out.is_contiguous() ? out : torch::stable::new_empty(out, {out.size(0)});
  check_launch(
      "anderson_mix",
      anderson_mix(
          float_of(X), x.const_data_ptr(), x.stride(0), f.const_data_ptr(), f.stride(0),
          weights.const_data_ptr<double>(), beta, X.size(0), X.size(1), target.mutable_data_ptr(), stream_of(X)));
  if (!out.is_contiguous()) {
    torch::stable::copy_(out, target);
  }
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(loraforge, CUDA, m) {
  m.impl("anderson_dots", TORCH_BOX(&dots));
  m.impl("anderson_mix", TORCH_BOX(&mix));
}

} // namespace loraforge::cuda
