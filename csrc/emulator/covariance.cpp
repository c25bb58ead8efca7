#include "../cuda/covariance.cu"

#include "cases.h"

using namespace loraforge::cuda;

// Rows of x may be longer than d, as in a slice of a wider tensor; `skip` entries at its start are left out, so that
// nothing is aligned.
LF_CASE(cov_pack) {
  const int64_t T = c.size("x", 0), ld = c.size("x", 1), d = c.integer("d"), skip = c.integer("skip");
  const bool masked = c.has("mask"), hinted = c.has("rows");
  int* kept = nullptr;
  int64_t count = T, room = hinted ? c.integer("rows") : T;
  if (masked) {
    kept = c.make<int>("kept", "i32", {room});
    if (const int code = cov_kept(c.data("mask"), T, kept, room, &count, nullptr)) {
      return code;
    }
  }
  const int64_t rows = hinted ? room : count;
  const std::string to = c.array("like").dtype;
  const auto* x = c.data<unsigned char>("x") + skip * static_cast<int64_t>(emulator::width(c.array("x").dtype));
  return cov_pack(
      c.kind("x"), x, ld, kept, hinted ? &count : nullptr, c.has("weight") ? c.kind("weight") : Float::f32,
      c.data("weight"), rows, d, c.kind("like"), c.make("out", to, {rows, d}), nullptr);
}

LF_CASE(cov_fold) {
  const int64_t m = c.integer("m"), n = c.integer("n"), ld = c.size("acc", 1);
  double* acc = c.make<double>("acc", "f64", {c.size("acc", 0), ld});
  std::memcpy(acc, c.data("acc"), c.array("acc").size);
  return cov_fold(
      acc, ld, m, n, c.kind("chunk"), c.data("chunk"), c.size("chunk", 0), c.size("chunk", 1) * c.size("chunk", 2),
      c.size("chunk", 2), c.integer("symmetric") != 0, c.integer("mirror") != 0, nullptr);
}
