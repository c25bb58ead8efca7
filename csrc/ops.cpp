// Every operator of the namespace `loraforge`, one line each. Shapes and formulas: loraforge/kernels/<file>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(loraforge, m) {
  m.def("anderson_dots(Tensor H, Tensor f) -> Tensor");
  m.def("anderson_mix(Tensor X, Tensor F, Tensor a, float beta, Tensor(a!) out) -> ()");
  m.def("dcs_variance(Tensor Y, Tensor M) -> Tensor");
  m.def("dcs_weights(Tensor V, float scale, float min_ess, bool excess, bool mad_consistent) -> (Tensor, Tensor)");
  m.def("dcs_batch(Tensor Y, Tensor M, Tensor? counts, float scale, float min_ess, bool excess, bool mad_consistent) "
        "-> (Tensor, Tensor)");
  m.def("consistency_forward(Tensor P, Tensor S, Tensor? mask, int rule, float threshold, Tensor? unit) -> Tensor");
  m.def("consistency_backward(Tensor grad, Tensor P, Tensor S, Tensor? mask, int rule, float threshold, Tensor? unit) "
        "-> Tensor");
  m.def("cov_pack(Tensor x, Tensor? mask, Tensor? weight, ScalarType dtype, int? rows=None) -> Tensor");
  m.def("cov_fold_(Tensor(a!) acc, Tensor chunk, bool symmetric, bool mirror=True) -> ()");
  m.def("entry_merge(Tensor[] left, Tensor[] right, float[] scaling, float[] weights, float[] low, float[] high, "
        "int[] keys, int limit, float gain, int first, bool elect, ScalarType dtype) -> Tensor");
  m.def("entry_counts_(Tensor(a!) counts, Tensor left, Tensor? right, float scaling, ScalarType dtype, bool wide, "
        "int[] prefixes, int low, int high) -> ()");
  m.def("drop_rescale_(Tensor(a!) tile, int key_low, int key_high, int first, int limit, float gain) -> ()");
  m.def("jacobi_svd(Tensor C, int sweeps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("gram_factor(Tensor G, float cut) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("pick_rank(Tensor S, float energy, int min_rank, int max_rank) -> Tensor");
  m.def("scale_write(Tensor U, Tensor S, Tensor Vh, int rank, ScalarType dtype) -> (Tensor, Tensor)");
}
