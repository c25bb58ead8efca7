// cov_pack and cov_fold_ on CUDA tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <optional>

#include "../common/layout.h"
#include "../common/operands.h"
#include "covariance.h"
#include "glue.h"

namespace loraforge::cuda {
namespace {

// The rows that a mask keeps: their numbers, and how many there are, on the device and where it is known on the host.
struct Kept {
  Tensor rows;
  Tensor count;
  int64_t known;
};

Kept find_kept(const Tensor& x, const Tensor& mask, std::optional<int64_t> hint) {
  const Tensor flat = torch::stable::contiguous(mask);
  const int64_t T = mask.size(0), room = hint.value_or(T);
  Kept kept{
      torch::stable::new_empty(x, {room}, ScalarType::Int), torch::stable::new_empty(x, {1}, ScalarType::Long), room};
  check_launch(
      "cov_pack",
      cov_kept(
          flat.const_data_ptr(), T, kept.rows.mutable_data_ptr<int32_t>(), room,
          kept.count.mutable_data_ptr<int64_t>(), stream_of(x)));
  if (!hint) { // the size of the result: one read by the host
    const torch::stable::Device host(torch::headeronly::DeviceType::CPU);
    kept.known = *torch::stable::to(kept.count, host).const_data_ptr<int64_t>();
  }
  return kept;
}

Tensor pack(
    const Tensor& x, std::optional<Tensor> mask, std::optional<Tensor> weight, ScalarType dtype,
    std::optional<int64_t> rows) {
  check_cov_pack(x, mask, weight);
  check_devices("cov_pack", {{"x", x}, {"mask", mask.value_or(x)}, {"weight", weight.value_or(x)}});
  const int64_t T = x.size(0), d = x.size(1);
  if (T > std::numeric_limits<int32_t>::max()) {
    refuse("cov_pack", "x", "shape " + shape_of(x), "fewer than 2^31 rows");
  }
  if (rows && (*rows < 0 || *rows > T || (!mask && *rows != T))) {
    refuse("cov_pack", "rows", "value " + std::to_string(*rows), "the number of rows that the mask keeps");
  }
  const DeviceGuard guard(x.get_device_index());
  const Tensor source = unit_stride(x);
  const std::optional<Tensor> scale =
      weight ? std::optional<Tensor>(torch::stable::contiguous(*weight)) : std::nullopt;
  const std::optional<Kept> kept = mask ? std::optional<Kept>(find_kept(x, *mask, rows)) : std::nullopt;
  const int64_t count = kept ? kept->known : T;
  Tensor out = torch::stable::new_empty(x, {count, d}, dtype);
  check_dtype("cov_pack", "the result", out, kFloats);
  check_launch(
      "cov_pack",
      cov_pack(
          float_of(x), source.const_data_ptr(), source.stride(0),
          kept ? kept->rows.const_data_ptr<int32_t>() : nullptr,
          kept && rows ? kept->count.const_data_ptr<int64_t>() : nullptr, scale ? float_of(*scale) : Float::f32,
          scale ? scale->const_data_ptr() : nullptr, count, d, float_of(out), out.mutable_data_ptr(), stream_of(x)));
  return out;
}

void fold(Tensor acc, const Tensor& chunk, bool symmetric, bool mirror) {
  check_cov_fold(acc, chunk, symmetric);
  check_devices("cov_fold_", {{"acc", acc}, {"chunk", chunk}});
  const int64_t m = acc.size(0), n = acc.size(1), axis = chunk.dim() - 2;
  const DeviceGuard guard(acc.get_device_index());
  Tensor target = unit_stride(acc);
  const Tensor slots = unit_stride(chunk);
  check_launch(
      "cov_fold_",
      cov_fold(
          target.mutable_data_ptr<double>(), target.stride(0), m, n, float_of(slots), slots.const_data_ptr(),
          axis == 1 ? slots.size(0) : 1, axis == 1 ? slots.stride(0) : 0, slots.stride(axis), symmetric, mirror,
          stream_of(acc)));
  if (target.const_data_ptr() != acc.const_data_ptr()) {
    torch::stable::copy_(acc, target);
  }
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(loraforge, CUDA, m) {
  m.impl("cov_pack", TORCH_BOX(&pack));
  m.impl("cov_fold_", TORCH_BOX(&fold));
}

} // namespace loraforge::cuda
