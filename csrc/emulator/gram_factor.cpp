#include "../cuda/gram_factor.cu"

#include "cases.h"

using namespace loraforge::cuda;

LF_CASE(gram_factor) {
  const int64_t b = c.size("G", 0), R = c.size("G", 1);
  const int64_t shared = c.integer("shared");
  double* scratch = c.make<double>("scratch", "f64", {gram_factor_scratch(b, R, shared)});
  return gram_factor(
      c.data<double>("G"), b, R, c.number("cut"), shared, scratch, c.make<double>("triangle", "f64", {b, R, R}),
      c.make<double>("solve", "f64", {b, R, R}), c.make<int64_t>("rank", "i64", {b}),
      c.make<double>("condition", "f64", {b}), nullptr);
}
