#include "../cuda/dcs.cu"

#include "cases.h"

using namespace loraforge::cuda;

namespace {

DcsForms forms_of(emulator::Case& c, size_t axis) {
  return {c.kind("Y"), c.data("Y"), c.kind("M"), c.data("M"), c.size("Y", axis)};
}

DcsSettings settings_of(emulator::Case& c) {
  return {c.number("scale"), c.number("min_ess"), c.integer("excess") != 0, c.integer("mad_consistent") != 0};
}

} // namespace

LF_CASE(dcs_variance) {
  const int64_t S = c.size("Y", 0);
  return dcs_variance({1, S, nullptr}, forms_of(c, 1), c.make<double>("v", "f64", {S}), nullptr);
}

LF_CASE(dcs_weights) {
  const int64_t S = c.size("V", 0);
  return dcs_weights(
      {1, S, nullptr}, c.data<double>("V"), settings_of(c), c.make<double>("w", "f64", {S}),
      c.make<double>("stats", "f64", {3}), nullptr);
}

LF_CASE(dcs_batch) {
  const int64_t b = c.size("Y", 0), S = c.size("Y", 1);
  return dcs_batch(
      {b, S, c.data<int64_t>("counts")}, forms_of(c, 2), settings_of(c), c.make<double>("w", "f64", {b, S}),
      c.make<double>("stats", "f64", {b, 3}), nullptr);
}

// The kernel of many modules, of float activations, for as few as are given.
LF_CASE(dcs_batch_at_once) {
  const int64_t b = c.size("Y", 0), S = c.size("Y", 1);
  const DcsRows rows{b, S, c.data<int64_t>("counts")};
  LF_LAUNCH(
      batch_kernel<float>, static_cast<unsigned>(b), kDcsThreads, 0, nullptr, rows, forms_of(c, 2), settings_of(c),
      c.make<double>("w", "f64", {b, S}), c.make<double>("stats", "f64", {b, 3}));
  return launched();
}
