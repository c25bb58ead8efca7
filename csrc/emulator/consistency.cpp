#include "../cuda/consistency.cu"

#include "cases.h"

using namespace loraforge::cuda;

namespace {

ConsistencyInput input_of(emulator::Case& c) {
  Mask mask = Mask::none;
  if (c.has("mask")) {
    const std::string& dtype = c.array("mask").dtype;
    mask = dtype == "u8" ? Mask::bytes : dtype == "f32" ? Mask::f32 : Mask::f64;
  }
  return {c.kind("P"),
          c.data("P"),
          c.data("S"),
          mask,
          c.data("mask"),
          c.size("P", 0),
          c.size("P", 1),
          static_cast<int>(c.integer("rule")),
          c.number("threshold"),
          c.data<double>("unit")};
}

} // namespace

LF_CASE(consistency_forward) {
  const ConsistencyInput input = input_of(c);
  double* partial = c.make<double>("partial", "f64", {consistency_blocks(input)});
  unsigned* ticket = c.make<unsigned>("ticket", "i32", {1});
  *ticket = 0;
  return consistency_forward(input, partial, ticket, c.make<double>("out", "f64", {1}), nullptr);
}

LF_CASE(consistency_backward) {
  const ConsistencyInput input = input_of(c);
  void* out = c.make("out", c.array("P").dtype, {input.tokens, input.width});
  return consistency_backward(input, c.data<double>("grad"), out, nullptr);
}
