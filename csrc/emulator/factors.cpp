#include "../cuda/factors.cu"

#include "cases.h"

using namespace loraforge::cuda;

// S (rows, R) is given as the columns of a transposed array where "across" is 1.
LF_CASE(pick_rank) {
  const bool across = c.integer("across") == 1;
  const int64_t rows = c.size("S", across ? 1 : 0), R = c.size("S", across ? 0 : 1);
  return pick_rank(
      c.kind("S"), c.data("S"), rows, R, across ? 1 : R, across ? rows : 1, c.number("energy"), c.integer("least"),
      c.integer("most"), c.make<int64_t>("ranks", "i64", {rows}), nullptr);
}

// U lies by columns, Vh by rows; "to" has the dtype of the result.
LF_CASE(scale_write) {
  const int64_t m = c.size("U", 1), n = c.size("Vh", 1), rank = c.integer("rank");
  const std::string to = c.array("to").dtype;
  void *B = c.make("B", to, {m, rank}), *A = c.make("A", to, {rank, n});
  return scale_write(
      c.kind("S"), c.kind("to"), {c.data("U"), 1, m}, c.data("S"), 1, {c.data("Vh"), n, 1}, m, n, rank, B, A, nullptr);
}
