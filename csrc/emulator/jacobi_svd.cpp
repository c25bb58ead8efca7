#include "../cuda/jacobi_svd.cu"

#include "cases.h"

using namespace loraforge::cuda;

// "shared" bytes of shared memory: 0 for all that there is, few to have the arrays in global memory.
LF_CASE(jacobi_svd) {
  const std::string dtype = c.array("C").dtype;
  const int64_t b = c.size("C", 0), m = c.size("C", 1), n = c.size("C", 2), k = m < n ? m : n;
  const int64_t shared = c.integer("shared");
  double* scratch = c.make<double>("scratch", "f64", {jacobi_svd_scratch(b, m, n, shared)});
  void *U = c.make("U", dtype, {b, m, k}), *S = c.make("S", dtype, {b, k}), *Vh = c.make("Vh", dtype, {b, k, n});
  return jacobi_svd(
      c.kind("C"), c.data("C"), b, m, n, static_cast<int>(c.integer("sweeps")), shared, scratch, U, S, Vh,
      c.make<int>("info", "i32", {b}), nullptr);
}
