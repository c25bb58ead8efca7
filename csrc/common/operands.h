// What each operator takes, the same on every device: dimensions, dtypes and sizes that fit each other. Where the tensors
// are is not looked at here: the dispatcher sends CPU tensors alone to the CPU form, and the CUDA form checks for itself.
#pragma once

#include <optional>
#include <vector>

#include "checks.h"
#include "consistency.h"

namespace loraforge {

constexpr auto kFloat32Or64 = {ScalarType::Float, ScalarType::Double};
constexpr auto kFloats = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half};

inline void check_anderson_dots(const Tensor& H, const Tensor& f) {
  constexpr const char* op = "anderson_dots";
  check_dim(op, "H", H, 2, "(m, P)");
  check_dim(op, "f", f, 1, "(P,)");
  check_dtype(op, "H", H, kFloat32Or64);
  check_dtype(op, "f", f, {H.scalar_type()});
  check_size(op, "f", f, 0, H.size(1), "P of H");
}

inline void check_anderson_mix(const Tensor& X, const Tensor& F, const Tensor& a, const Tensor& out) {
  constexpr const char* op = "anderson_mix";
  check_dim(op, "X", X, 2, "(m, P)");
  check_dim(op, "F", F, 2, "(m, P)");
  check_dim(op, "a", a, 1, "(m,)");
  check_dim(op, "out", out, 1, "(P,)");
  check_dtype(op, "X", X, kFloat32Or64);
  check_dtype(op, "F", F, {X.scalar_type()});
  check_dtype(op, "out", out, {X.scalar_type()});
  check_dtype(op, "a", a, {ScalarType::Double});
  check_size(op, "F", F, 0, X.size(0), "m of X");
  check_size(op, "F", F, 1, X.size(1), "P of X");
  check_size(op, "a", a, 0, X.size(0), "m of X");
  check_size(op, "out", out, 0, X.size(1), "P of X");
}

inline void check_dcs_variance(const Tensor& Y, const Tensor& M) {
  constexpr const char* op = "dcs_variance";
  check_dim(op, "Y", Y, 2, "(S, R)");
  check_dim(op, "M", M, 2, "(R, R)");
  check_dtype(op, "Y", Y, kFloats);
  check_dtype(op, "M", M, kFloat32Or64);
  check_size(op, "M", M, 0, Y.size(1), "R of Y");
  check_size(op, "M", M, 1, Y.size(1), "R of Y");
}

inline void check_dcs_weights(const Tensor& V) {
  check_dim("dcs_weights", "V", V, 1, "(S,)");
  check_dtype("dcs_weights", "V", V, {ScalarType::Double});
}

inline void check_dcs_batch(const Tensor& Y, const Tensor& M, const std::optional<Tensor>& counts) {
  constexpr const char* op = "dcs_batch";
  check_dim(op, "Y", Y, 3, "(b, S, R)");
  check_dim(op, "M", M, 3, "(b, R, R)");
  check_dtype(op, "Y", Y, kFloats);
  check_dtype(op, "M", M, kFloat32Or64);
  check_size(op, "M", M, 0, Y.size(0), "b of Y");
  check_size(op, "M", M, 1, Y.size(2), "R of Y");
  check_size(op, "M", M, 2, Y.size(2), "R of Y");
  if (counts) {
    check_dim(op, "counts", *counts, 1, "(b,)");
    check_dtype(op, "counts", *counts, {ScalarType::Long});
    check_size(op, "counts", *counts, 0, Y.size(0), "b of Y");
  }
}

inline void check_cov_pack(const Tensor& x, const std::optional<Tensor>& mask, const std::optional<Tensor>& weight) {
  constexpr const char* op = "cov_pack";
  check_dim(op, "x", x, 2, "(T, d)");
  check_dtype(op, "x", x, kFloats);
  if (mask) {
    check_dim(op, "mask", *mask, 1, "(T,)");
    check_dtype(op, "mask", *mask, {ScalarType::Bool});
    check_size(op, "mask", *mask, 0, x.size(0), "T of x");
  }
  if (weight) {
    check_dim(op, "weight", *weight, 1, "(T,)");
    check_dtype(op, "weight", *weight, kFloats);
    check_size(op, "weight", *weight, 0, x.size(0), "T of x");
  }
}

inline void check_cov_fold(const Tensor& acc, const Tensor& chunk, bool symmetric) {
  constexpr const char* op = "cov_fold_";
  const int64_t axis = chunk.dim() == 3 ? 1 : 0;
  check_dim(op, "acc", acc, 2, "(d, d)");
  check_dim(op, "chunk", chunk, axis + 2, "(d, d) or (slots, d, d)");
  check_dtype(op, "acc", acc, {ScalarType::Double});
  check_dtype(op, "chunk", chunk, kFloat32Or64);
  check_size(op, "chunk", chunk, axis, acc.size(0), "rows of acc");
  check_size(op, "chunk", chunk, axis + 1, acc.size(1), "columns of acc");
  if (symmetric) {
    check_size(op, "acc", acc, 1, acc.size(0), "a symmetric acc is square");
  }
}

inline void check_pick_rank(const Tensor& S) {
  check_dim("pick_rank", "S", S, S.dim() == 1 ? 1 : 2, "(R,) or (b, R)");
  check_dtype("pick_rank", "S", S, kFloat32Or64);
}

inline void check_scale_write(const Tensor& U, const Tensor& S, const Tensor& Vh, int64_t rank) {
  constexpr const char* op = "scale_write";
  check_dim(op, "U", U, 2, "(m, R)");
  check_dim(op, "S", S, 1, "(R,)");
  check_dim(op, "Vh", Vh, 2, "(R, n)");
  check_dtype(op, "S", S, kFloat32Or64);
  check_dtype(op, "U", U, {S.scalar_type()});
  check_dtype(op, "Vh", Vh, {S.scalar_type()});
  check_size(op, "U", U, 1, S.size(0), "R of S");
  check_size(op, "Vh", Vh, 0, S.size(0), "R of S");
  if (rank < 0 || rank > S.size(0)) {
    refuse(op, "rank", "value " + std::to_string(rank), "0 to " + std::to_string(S.size(0)));
  }
}

inline void check_consistency(
    const char* op, const Tensor& P, const Tensor& S, const std::optional<Tensor>& mask, int64_t rule,
    const std::optional<Tensor>& unit) {
  check_dim(op, "P", P, 2, "(T, H)");
  check_dim(op, "S", S, 2, "(T, H)");
  check_dtype(op, "P", P, kFloats);
  check_dtype(op, "S", S, {P.scalar_type()});
  check_size(op, "S", S, 0, P.size(0), "T of P");
  check_size(op, "S", S, 1, P.size(1), "H of P");
  if (mask) {
    check_dim(op, "mask", *mask, 1, "(T,)");
    check_size(op, "mask", *mask, 0, P.size(0), "T of P");
    check_dtype(op, "mask", *mask, {ScalarType::Bool, ScalarType::Float, ScalarType::Double});
  }
  if (unit) {
    check_dim(op, "unit", *unit, 0, "()");
    check_dtype(op, "unit", *unit, {ScalarType::Double});
  }
  if (rule < 0 || rule >= kConsistencyRules) {
    refuse(op, "rule", "value " + std::to_string(rule), "0 to " + std::to_string(kConsistencyRules - 1));
  }
}

// One adapter's entries: B (t, r) and A (r, n) in double, or rows (t, n) of any float type.
inline void check_entries(const char* op, const Tensor& left, const Tensor* right) {
  check_dim(op, "left", left, 2, right ? "(t, r)" : "(t, n)");
  if (right == nullptr) {
    check_dtype(op, "left", left, kFloats);
    return;
  }
  check_dim(op, "right", *right, 2, "(r, n)");
  check_dtype(op, "left", left, {ScalarType::Double});
  check_dtype(op, "right", *right, {ScalarType::Double});
  check_size(op, "right", *right, 0, left.size(1), "r of left");
}

inline void check_entry_dtype(const char* op, ScalarType dtype) {
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) {
    refuse(op, "an entry", std::string("dtype ") + torch::headeronly::toString(dtype), "dtype Float or Double");
  }
}

// A draw of 32 bits is kept where it is below the limit.
inline void check_draw_limit(const char* op, int64_t limit, int64_t most) {
  if (limit < 0 || limit > most) {
    refuse(op, "limit", "value " + std::to_string(limit), "0 to " + std::to_string(most));
  }
}

inline void check_length(const char* op, const char* name, size_t got, size_t expected) {
  if (got != expected) {
    refuse(op, name, "length " + std::to_string(got), "length " + std::to_string(expected));
  }
}

// Everything of entry_merge but the entries themselves.
inline void check_entry_merge(
    const std::vector<Tensor>& left, const std::vector<Tensor>& right, const std::vector<double>& scaling,
    const std::vector<double>& weights, const std::vector<double>& low, const std::vector<double>& high,
    const std::vector<int64_t>& keys, int64_t limit, ScalarType dtype) {
  constexpr const char* op = "entry_merge";
  const size_t count = left.size();
  if (count == 0) {
    refuse(op, "left", "no tensors", "one or more");
  }
  check_length(op, "right", right.size(), right.empty() ? 0 : count);
  check_length(op, "scaling", scaling.size(), count);
  check_length(op, "weights", weights.size(), count);
  check_length(op, "low", low.size(), count);
  check_length(op, "high", high.size(), count);
  check_length(op, "keys", keys.size(), 2 * count);
  check_draw_limit(op, limit, int64_t{1} << 32);
  check_entry_dtype(op, dtype);
  for (size_t i = 0; i < count; ++i) {
    const Tensor* other = right.empty() ? nullptr : &right[i];
    check_entries(op, left[i], other);
    check_size(op, "left", left[i], 0, left[0].size(0), "rows of the first");
    const Tensor& wide = other ? *other : left[i];
    check_size(op, other ? "right" : "left", wide, 1, (other ? right[0] : left[0]).size(1), "columns of the first");
  }
}

inline void check_entry_counts(
    const Tensor& counts, const Tensor& left, const Tensor* right, ScalarType dtype, bool wide, size_t prefixes,
    int64_t low, int64_t high) {
  constexpr const char* op = "entry_counts_";
  check_dim(op, "counts", counts, 2, "(prefixes, 2^(high - low))");
  check_dtype(op, "counts", counts, {ScalarType::Long});
  if (low < 0 || high <= low || high > (wide ? 63 : 31) || high - low > 20) {
    refuse(
        op, "the digit", "bits " + std::to_string(low) + " to " + std::to_string(high),
        std::string("at most 20 of ") + (wide ? "63" : "31") + " bits");
  }
  check_size(op, "counts", counts, 0, static_cast<int64_t>(prefixes), "number of prefixes");
  check_size(op, "counts", counts, 1, int64_t{1} << (high - low), "values of a digit");
  if (!counts.is_contiguous()) {
    refuse(op, "counts", "rows that lie apart", "a contiguous tensor");
  }
  check_entries(op, left, right);
  check_entry_dtype(op, dtype);
}

inline void check_drop_rescale(const Tensor& tile, int64_t limit) {
  check_dim("drop_rescale_", "tile", tile, 2, "(t, n)");
  check_dtype("drop_rescale_", "tile", tile, kFloat32Or64);
  check_draw_limit("drop_rescale_", limit, (int64_t{1} << 32) - 1);
}

} // namespace loraforge
