// Every operator of the namespace `loraforge`, one line each. Shapes and formulas: loraforge/kernels/<file>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(loraforge, m) {
  m.def("anderson_dots(Tensor H, Tensor f) -> Tensor");
  m.def("anderson_mix(Tensor X, Tensor F, Tensor a, float beta, Tensor(a!) out) -> ()");
  m.def("dcs_variance(Tensor Y, Tensor M) -> Tensor");
  m.def("dcs_weights(Tensor V, float scale, float min_ess, bool excess, bool mad_consistent) -> (Tensor, Tensor)");
  m.def("cov_pack(Tensor x, Tensor? mask, Tensor? weight, ScalarType dtype) -> Tensor");
  m.def("cov_fold_(Tensor(a!) acc, Tensor chunk, bool symmetric) -> ()");
  m.def("pick_rank(Tensor S, float energy, int min_rank, int max_rank) -> Tensor");
  m.def("scale_write(Tensor U, Tensor S, Tensor Vh, int rank, ScalarType dtype) -> (Tensor, Tensor)");
}
