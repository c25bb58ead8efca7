// anderson_dots and anderson_mix on CUDA tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/layout.h"
#include "anderson.h"
#include "glue.h"

namespace loraforge::cuda {
namespace {

Tensor dots(const Tensor& H, const Tensor& f) {
  check_shapes("anderson_dots", "H", H, 2, "(m, P)");
  check_shapes("anderson_dots", "f", f, 1, "(P,)");
  check_devices("anderson_dots", {{"H", H}, {"f", f}});
  check_dtype("anderson_dots", "H", H, {ScalarType::Float, ScalarType::Double});
  check_dtype("anderson_dots", "f", f, {H.scalar_type()});
  check_size("anderson_dots", "f", f, 0, H.size(1), "P of H");
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
  check_shapes("anderson_mix", "X", X, 2, "(m, P)");
  check_shapes("anderson_mix", "F", F, 2, "(m, P)");
  check_shapes("anderson_mix", "a", a, 1, "(m,)");
  check_shapes("anderson_mix", "out", out, 1, "(P,)");
  check_devices("anderson_mix", {{"X", X}, {"F", F}, {"a", a}, {"out", out}});
  check_dtype("anderson_mix", "X", X, {ScalarType::Float, ScalarType::Double});
  check_dtype("anderson_mix", "F", F, {X.scalar_type()});
  check_dtype("anderson_mix", "out", out, {X.scalar_type()});
  check_dtype("anderson_mix", "a", a, {ScalarType::Double});
  check_size("anderson_mix", "F", F, 0, X.size(0), "m of X");
  check_size("anderson_mix", "F", F, 1, X.size(1), "P of X");
  check_size("anderson_mix", "a", a, 0, X.size(0), "m of X");
  check_size("anderson_mix", "out", out, 0, X.size(1), "P of X");
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
