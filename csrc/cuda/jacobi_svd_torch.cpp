// jacobi_svd on CUDA tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "glue.h"
#include "jacobi_svd.h"

namespace loraforge::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> svd(const Tensor& C, int64_t sweeps) {
  check_dim("jacobi_svd", "C", C, 3, "(b, R, R')");
  check_devices("jacobi_svd", {{"C", C}});
  check_dtype("jacobi_svd", "C", C, {ScalarType::Float, ScalarType::Double});
  const int64_t b = C.size(0), m = C.size(1), n = C.size(2), k = m < n ? m : n;
  if ((m < n ? n : m) > 1024) {
    refuse("jacobi_svd", "C", "shape " + shape_of(C), "matrices of at most 1024 rows and columns");
  }
  const DeviceGuard guard(C.get_device_index());
  const Tensor cores = torch::stable::contiguous(C);
  Tensor U = torch::stable::new_empty(C, {b, m, k}), S = torch::stable::new_empty(C, {b, k});
  Tensor Vh = torch::stable::new_empty(C, {b, k, n});
  Tensor info = torch::stable::new_zeros(C, {b}, ScalarType::Int);
  if (b * k == 0) {
    return {U, S, Vh, info};
  }
  Tensor scratch = torch::stable::new_empty(C, {jacobi_svd_scratch(b, m, n, 0)}, ScalarType::Double);
  check_launch(
      "jacobi_svd",
      jacobi_svd(
          float_of(C), cores.const_data_ptr(), b, m, n, static_cast<int>(sweeps), 0, scratch.mutable_data_ptr<double>(),
          U.mutable_data_ptr(), S.mutable_data_ptr(), Vh.mutable_data_ptr(), info.mutable_data_ptr<int>(),
          stream_of(C)));
  return {U, S, Vh, info};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(loraforge, CUDA, m) {
  m.impl("jacobi_svd", TORCH_BOX(&svd));
}

} // namespace loraforge::cuda
