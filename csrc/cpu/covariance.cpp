// Preparation of rows for a Gram product, and the addition of a product into a double accumulator.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../common/cast.h"
#include "../common/operands.h"
#include "../common/isa.h"
#include "../common/layout.h"

namespace loraforge {
namespace {

template <typename From, typename To, typename Compute>
LF_BODY void pack_body(const From* from, To* to, Compute weight, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    to[i] = cast_one<Compute, To>(cast_one<From, Compute>(from[i]) * weight);
  }
}

// One clone a pair of types; double arithmetic where either side is double, else float.
#define LF_PACK(From, To, Compute)                                            \
  LF_CLONES void pack_row(const From* from, To* to, double weight, int64_t n) { \
    pack_body<From, To, Compute>(from, to, static_cast<Compute>(weight), n);    \
  }
#define LF_PACK_FROM(From, Wide)  \
  LF_PACK(From, float, Wide)      \
  LF_PACK(From, BFloat16, Wide)   \
  LF_PACK(From, Half, Wide)       \
  LF_PACK(From, double, double)
LF_PACK_FROM(float, float)
LF_PACK_FROM(BFloat16, float)
LF_PACK_FROM(Half, float)
LF_PACK_FROM(double, double)
#undef LF_PACK_FROM
#undef LF_PACK

std::vector<double> as_doubles(const Tensor& t) {
  const Tensor flat = torch::stable::contiguous(t);
  std::vector<double> values(static_cast<size_t>(t.size(0)));
  for_float_type(t.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(flat.const_data_ptr());
    std::transform(from, from + values.size(), values.begin(), [](T x) { return cast_one<T, double>(x); });
  });
  return values;
}

std::vector<int64_t> kept_rows(const std::optional<Tensor>& mask, int64_t rows) {
  std::vector<int64_t> kept;
  kept.reserve(static_cast<size_t>(rows));
  const std::optional<Tensor> flat = mask ? std::optional<Tensor>(torch::stable::contiguous(*mask)) : std::nullopt;
  const bool* keep = flat ? flat->const_data_ptr<bool>() : nullptr;
  for (int64_t t = 0; t < rows; ++t) {
    if (keep == nullptr || keep[t]) {
      kept.push_back(t);
    }
  }
  return kept;
}

Tensor cov_pack(
    const Tensor& x, std::optional<Tensor> mask, std::optional<Tensor> weight, ScalarType dtype,
    std::optional<int64_t> expected) {
  check_cov_pack(x, mask, weight);
  const Tensor rows = unit_stride(x);
  const int64_t d = x.size(1), stride = rows.stride(0);
  const std::vector<int64_t> kept = kept_rows(mask, x.size(0));
  const std::vector<double> scale = weight ? as_doubles(*weight) : std::vector<double>();
  const int64_t count = static_cast<int64_t>(kept.size());
  if (expected && *expected != count) {
    refuse("cov_pack", "rows", "value " + std::to_string(*expected), std::to_string(count) + ", the rows kept");
  }
  Tensor out = torch::stable::new_empty(x, {count, d}, dtype);
  check_dtype("cov_pack", "the result", out, kFloats);
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, d));
  for_float_type(x.scalar_type(), [&](auto from_zero) {
    for_float_type(dtype, [&](auto to_zero) {
      using From = decltype(from_zero);
      using To = decltype(to_zero);
      const From* from = static_cast<const From*>(rows.const_data_ptr());
      To* to = static_cast<To*>(out.mutable_data_ptr());
      torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          const From* row = from + kept[static_cast<size_t>(t)] * stride;
          if (std::is_same_v<From, To> && scale.empty()) {
            std::memcpy(static_cast<void*>(to + t * d), row, static_cast<size_t>(d) * sizeof(From));
          } else {
            pack_row(row, to + t * d, scale.empty() ? 1.0 : scale[static_cast<size_t>(kept[static_cast<size_t>(t)])], d);
          }
        }
      });
    });
  });
  return out;
}

template <typename T>
LF_BODY void add_body(double* acc, const T* values, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    acc[i] += static_cast<double>(values[i]);
  }
}

LF_CLONES void add_row(double* acc, const float* values, int64_t n) {
  add_body(acc, values, n);
}
LF_CLONES void add_row(double* acc, const double* values, int64_t n) {
  add_body(acc, values, n);
}

// What is folded: the slots of `from` into d x d' of the accumulator.
template <typename T>
struct Chunk {
  const T* from;
  int64_t slots, slot_stride, ld;

  void add_to(double* acc, int64_t row, int64_t column, int64_t n) const {
    for (int64_t slot = 0; slot < slots; ++slot) {
      add_row(acc, from + slot * slot_stride + row * ld + column, n);
    }
  }
};

constexpr int64_t kEdge = 32;  // edge of the tiles that are mirrored through the first cache
constexpr int64_t kStrip = 512; // columns that a band of kEdge rows takes at a time: long enough for memory, short for L2

// Rows i0 to i1 and columns j0 to j1 of the upper triangle, copied below the diagonal.
void mirror_strip(double* acc, int64_t ld, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  double turned[kEdge][kEdge];
  for (int64_t j = j0; j < j1; j += kEdge) {
    const int64_t end = std::min(j + kEdge, j1);
    for (int64_t i = i0; i < i1; ++i) {
      for (int64_t column = std::max(j, i); column < end; ++column) {
        turned[column - j][i - i0] = acc[i * ld + column];
      }
    }
    for (int64_t row = j; row < end; ++row) {
      const int64_t short_of_diagonal = std::max<int64_t>(std::min(i1, row) - i0, 0);
      std::copy_n(turned[row - j], short_of_diagonal, acc + row * ld + i0);
    }
  }
}

// A band of rows takes the upper triangle of the chunk, and with `mirror` its columns below the diagonal the same.
template <typename T>
void fold_band(double* acc, int64_t ld, const Chunk<T>& chunk, int64_t d, int64_t i0, bool mirror) {
  const int64_t i1 = std::min(i0 + kEdge, d);
  for (int64_t j0 = i0; j0 < d; j0 += kStrip) {
    const int64_t j1 = std::min(j0 + kStrip, d);
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t begin = std::max(j0, i);
      if (begin < j1) {
        chunk.add_to(acc + i * ld + begin, i, begin, j1 - begin);
      }
    }
    if (mirror) {
      mirror_strip(acc, ld, i0, i1, j0, j1);
    }
  }
}

template <typename T>
void fold_into(const Tensor& acc, const Tensor& chunk, bool symmetric, bool mirror) {
  const int64_t m = acc.size(0), n = acc.size(1), ld = acc.stride(0), bands = (m + kEdge - 1) / kEdge;
  const int64_t axis = chunk.dim() - 2;
  double* to = acc.mutable_data_ptr<double>();
  const Chunk<T> from{
      chunk.const_data_ptr<T>(), axis == 1 ? chunk.size(0) : 1, axis == 1 ? chunk.stride(0) : 0, chunk.stride(axis)};
  torch::stable::parallel_for(0, bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (symmetric) {
        fold_band(to, ld, from, m, row * kEdge, mirror);
      } else {
        for (int64_t i = row * kEdge; i < std::min((row + 1) * kEdge, m); ++i) {
          from.add_to(to + i * ld, i, 0, n);
        }
      }
    }
  });
}

void cov_fold_(Tensor acc, const Tensor& chunk, bool symmetric, bool mirror) {
  check_cov_fold(acc, chunk, symmetric);
  Tensor target = unit_stride(acc);
  const Tensor rows = unit_stride(chunk);
  if (chunk.scalar_type() == ScalarType::Float) {
    fold_into<float>(target, rows, symmetric, mirror);
  } else {
    fold_into<double>(target, rows, symmetric, mirror);
  }
  if (target.const_data_ptr() != acc.const_data_ptr()) {
    torch::stable::copy_(acc, target);
  }
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(loraforge, CPU, m) {
  m.impl("cov_pack", TORCH_BOX(&cov_pack));
  m.impl("cov_fold_", TORCH_BOX(&cov_fold_));
}

} // namespace loraforge
