// pick_rank and scale_write on CUDA tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/operands.h"
#include "factors.h"
#include "glue.h"

namespace loraforge::cuda {
namespace {

Tensor ranks(const Tensor& S, double energy, int64_t min_rank, int64_t max_rank) {
  check_pick_rank(S);
  check_devices("pick_rank", {{"S", S}});
  const DeviceGuard guard(S.get_device_index());
  const bool many = S.dim() == 2;
  const int64_t R = S.size(S.dim() - 1), b = many ? S.size(0) : 1;
  Tensor out = many ? torch::stable::new_empty(S, {b}, ScalarType::Long)
                    : torch::stable::new_empty(S, {}, ScalarType::Long);
  check_launch(
      "pick_rank",
      pick_rank(
          float_of(S), S.const_data_ptr(), b, R, many ? S.stride(0) : 0, S.stride(S.dim() - 1), energy, min_rank,
          max_rank < R ? max_rank : R, out.mutable_data_ptr<int64_t>(), stream_of(S)));
  return out;
}

std::tuple<Tensor, Tensor> factors(
    const Tensor& U, const Tensor& S, const Tensor& Vh, int64_t rank, ScalarType dtype) {
  check_scale_write(U, S, Vh, rank);
  check_devices("scale_write", {{"U", U}, {"S", S}, {"Vh", Vh}});
  const DeviceGuard guard(S.get_device_index());
  Tensor B = torch::stable::new_empty(U, {U.size(0), rank}, dtype);
  Tensor A = torch::stable::new_empty(U, {rank, Vh.size(1)}, dtype);
  check_dtype("scale_write", "the result", B, kFloats);
  const Strided left{U.const_data_ptr(), U.stride(0), U.stride(1)};
  const Strided right{Vh.const_data_ptr(), Vh.stride(0), Vh.stride(1)};
  check_launch(
      "scale_write",
      scale_write(
          float_of(S), float_of(B), left, S.const_data_ptr(), S.stride(0), right, U.size(0), Vh.size(1), rank,
          B.mutable_data_ptr(), A.mutable_data_ptr(), stream_of(S)));
  return {B, A};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(loraforge, CUDA, m) {
  m.impl("pick_rank", TORCH_BOX(&ranks));
  m.impl("scale_write", TORCH_BOX(&factors));
}

} // namespace loraforge::cuda
