// What follows the SVD of a core: the rank that an energy asks for, and the split of the singular values over two factors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/cast.h"
#include "../common/operands.h"

namespace loraforge {
namespace {

// Scaling by a power of two is exact: ties at the threshold stay ties, and squares of any S neither over- nor underflow.
template <typename T>
int64_t rank_of(const T* s, int64_t R, double energy) {
  const double top = R ? static_cast<double>(*std::max_element(s, s + R)) : 0.0;
  if (!(top > 0.0)) {
    return 0;
  }
  int exponent;
  std::frexp(top, &exponent);
  const double unit = std::ldexp(1.0, -std::max(exponent, -1000));
  double total = 0.0, head = 0.0;
  for (int64_t i = 0; i < R; ++i) {
    const double value = static_cast<double>(s[i]) * unit;
    total += value * value;
  }
  for (int64_t i = 0; i < R; ++i) {
    const double value = static_cast<double>(s[i]) * unit;
    head += value * value;
    if (head >= energy * total) {
      return i + 1;
    }
  }
  return R;
}

Tensor pick_rank(const Tensor& S, double energy, int64_t min_rank, int64_t max_rank) {
  check_pick_rank(S);
  const Tensor rows = torch::stable::contiguous(S);
  const int64_t R = S.size(S.dim() - 1), b = S.dim() == 2 ? S.size(0) : 1;
  Tensor out = S.dim() == 2 ? torch::stable::new_empty(S, {b}, ScalarType::Long)
                            : torch::stable::new_empty(S, {}, ScalarType::Long);
  int64_t* ranks = out.mutable_data_ptr<int64_t>();
  const int64_t cap = std::min(max_rank, R);
  for (int64_t row = 0; row < b; ++row) {
    const int64_t rank = S.scalar_type() == ScalarType::Float
        ? rank_of(rows.const_data_ptr<float>() + row * R, R, energy)
        : rank_of(rows.const_data_ptr<double>() + row * R, R, energy);
    ranks[row] = std::min(std::max(rank, min_rank), cap);
  }
  return out;
}

// Rows of unit stride times one factor each column, and times one factor.
template <typename T, typename Out>
LF_BODY void columns_body(const T* x, int64_t row, const T* roots, int64_t rows, int64_t columns, Out* out) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < columns; ++k) {
      out[i * columns + k] = cast_one<T, Out>(x[i * row + k] * roots[k]);
    }
  }
}

template <typename T, typename Out>
LF_BODY void row_body(const T* x, T root, int64_t count, Out* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = cast_one<T, Out>(x[i] * root);
  }
}

#define LF_SCALE(T, Out)                                                                                       \
  LF_CLONES void scale_columns(                                                                                \
      const T* x, int64_t row, const T* roots, int64_t rows, int64_t columns, Out* out) {                      \
    columns_body(x, row, roots, rows, columns, out);                                                           \
  }                                                                                                            \
  LF_CLONES void scale_row(const T* x, T root, int64_t count, Out* out) {                                      \
    row_body(x, root, count, out);                                                                             \
  }
#define LF_SCALE_FROM(T) \
  LF_SCALE(T, float)     \
  LF_SCALE(T, double)    \
  LF_SCALE(T, BFloat16)  \
  LF_SCALE(T, Half)
LF_SCALE_FROM(float)
LF_SCALE_FROM(double)
#undef LF_SCALE_FROM
#undef LF_SCALE

template <typename T, typename Out>
void write_factors(const Tensor& U, const Tensor& S, const Tensor& Vh, int64_t rank, Out* left, Out* right) {
  const int64_t m = U.size(0), n = Vh.size(1), u0 = U.stride(0), u1 = U.stride(1), v0 = Vh.stride(0), v1 = Vh.stride(1);
  const T* u = U.const_data_ptr<T>();
  const T* v = Vh.const_data_ptr<T>();
  std::vector<T> roots(rank);
  for (int64_t k = 0; k < rank; ++k) {
    roots[k] = std::sqrt(S.const_data_ptr<T>()[k * S.stride(0)]);
  }
  if (u1 == 1) {
    scale_columns(u, u0, roots.data(), m, rank, left);
  } else {
    constexpr int64_t kRows = 64; // which stay in the first cache while columns are gathered
    std::vector<T> block(kRows * rank);
    for (int64_t begin = 0; begin < m; begin += kRows) {
      const int64_t rows = std::min(kRows, m - begin);
      for (int64_t k = 0; k < rank; ++k) {
        for (int64_t i = 0; i < rows; ++i) {
          block[i * rank + k] = u[(begin + i) * u0 + k * u1];
        }
      }
      scale_columns(block.data(), rank, roots.data(), rows, rank, left + begin * rank);
    }
  }
  for (int64_t k = 0; k < rank; ++k) {
    if (v1 == 1) {
      scale_row(v + k * v0, roots[k], n, right + k * n);
      continue;
    }
    for (int64_t i = 0; i < n; ++i) {
      right[k * n + i] = cast_one<T, Out>(v[k * v0 + i * v1] * roots[k]);
    }
  }
}

std::tuple<Tensor, Tensor> scale_write(
    const Tensor& U, const Tensor& S, const Tensor& Vh, int64_t rank, ScalarType dtype) {
  check_scale_write(U, S, Vh, rank);
  Tensor B = torch::stable::new_empty(U, {U.size(0), rank}, dtype);
  Tensor A = torch::stable::new_empty(U, {rank, Vh.size(1)}, dtype);
  check_dtype("scale_write", "the result", B, kFloats);
  for_float_type(dtype, [&](auto zero) {
    using Out = decltype(zero);
    Out* left = static_cast<Out*>(B.mutable_data_ptr());
    Out* right = static_cast<Out*>(A.mutable_data_ptr());
    if (S.scalar_type() == ScalarType::Float) {
      write_factors<float>(U, S, Vh, rank, left, right);
    } else {
      write_factors<double>(U, S, Vh, rank, left, right);
    }
  });
  return {B, A};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(loraforge, CPU, m) {
  m.impl("pick_rank", TORCH_BOX(&pick_rank));
  m.impl("scale_write", TORCH_BOX(&scale_write));
}

} // namespace loraforge
