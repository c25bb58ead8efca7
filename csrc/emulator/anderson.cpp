#include "../cuda/anderson.cu"

#include "cases.h"

using namespace loraforge::cuda;

LF_CASE(anderson_dots) {
  const int64_t m = c.size("H", 0), ld = c.size("H", 1), P = c.size("f", 0), blocks = anderson_blocks(P);
  double* partial = c.make<double>("partial", "f64", {blocks, m + 1});
  unsigned* ticket = c.make<unsigned>("ticket", "i32", {1});
  *ticket = 0;
  return anderson_dots(
      c.kind("f"), c.data("H"), ld, c.data("f"), m, P, partial, ticket, c.make<double>("out", "f64", {m + 1}), nullptr);
}

// Rows of X and F may be longer than out, as in a ring buffer.
LF_CASE(anderson_mix) {
  const int64_t m = c.size("X", 0), P = c.integer("P");
  void* out = c.make("out", c.array("X").dtype, {P});
  return anderson_mix(
      c.kind("X"), c.data("X"), c.size("X", 1), c.data("F"), c.size("F", 1), c.data<double>("a"), c.number("beta"), m, P,
      out, nullptr);
}
