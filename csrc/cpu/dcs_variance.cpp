// Output variance of tokens as a quadratic form.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../common/cast.h"
#include "../common/checks.h"
#include "../common/isa.h"

namespace loraforge {
namespace {

constexpr int64_t kRows = 12; // tokens that share the loads of M

// v_s = y_s^T M y_s for kRows tokens. y: (kRows, R); M: symmetric, as panels of kLanes columns, each (R, kLanes); R is a
// multiple of kLanes. Only the blocks on and left of the diagonal are multiplied.
LF_CLONES void quadratic_form(const double* y, const double* panels, int64_t R, double* v) {
  DoubleLanes total[kRows] = {}, columns;
  for (int64_t i = 0; i < R; i += kLanes) {
    const double* panel = panels + i * R;
    DoubleLanes acc[kRows] = {};
    for (int64_t j = 0; j < i; ++j) {
      load_lanes(panel + j * kLanes, columns);
      for (int64_t s = 0; s < kRows; ++s) {
        acc[s] += y[s * R + j] * columns;
      }
    }
    for (int64_t s = 0; s < kRows; ++s) {
      acc[s] += acc[s];
    }
    for (int64_t j = i; j < i + kLanes; ++j) {
      load_lanes(panel + j * kLanes, columns);
      for (int64_t s = 0; s < kRows; ++s) {
        acc[s] += y[s * R + j] * columns;
      }
    }
    for (int64_t s = 0; s < kRows; ++s) {
      load_lanes(y + s * R + i, columns);
      total[s] += acc[s] * columns;
    }
  }
  for (int64_t s = 0; s < kRows; ++s) {
    v[s] = sum_lanes(total[s]);
  }
}

template <typename T>
std::vector<double> symmetric_panels(const Tensor& M, int64_t R, int64_t padded) {
  const T* m = M.const_data_ptr<T>();
  std::vector<double> panels(static_cast<size_t>(padded * padded), 0.0);
  for (int64_t i = 0; i < R; ++i) {
    for (int64_t j = 0; j < R; ++j) {
      const double both = static_cast<double>(m[i * R + j]) + static_cast<double>(m[j * R + i]);
      panels[static_cast<size_t>((j / kLanes) * kLanes * padded + i * kLanes + j % kLanes)] = 0.5 * both;
    }
  }
  return panels;
}

Tensor dcs_variance(const Tensor& Y, const Tensor& M) {
  check_dim("dcs_variance", "Y", Y, 2, "(S, R)");
  check_dim("dcs_variance", "M", M, 2, "(R, R)");
  check_dtype(
      "dcs_variance", "Y", Y, {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half});
  check_dtype("dcs_variance", "M", M, {ScalarType::Float, ScalarType::Double});
  check_size("dcs_variance", "M", M, 0, Y.size(1), "R of Y");
  check_size("dcs_variance", "M", M, 1, Y.size(1), "R of Y");
  const Tensor rows = torch::stable::contiguous(Y), form = torch::stable::contiguous(M);
  const int64_t S = Y.size(0), R = Y.size(1), padded = (R + kLanes - 1) / kLanes * kLanes;
  const std::vector<double> panels = M.scalar_type() == ScalarType::Float ? symmetric_panels<float>(form, R, padded)
                                                                          : symmetric_panels<double>(form, R, padded);
  Tensor out = torch::stable::new_empty(Y, {S}, ScalarType::Double);
  double* v = out.mutable_data_ptr<double>();
  for_float_type(Y.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* y = static_cast<const T*>(rows.const_data_ptr());
    torch::stable::parallel_for(0, (S + kRows - 1) / kRows, 4, [&](int64_t begin, int64_t end) {
      std::vector<double> wide(static_cast<size_t>(padded * kRows), 0.0);
      double values[kRows];
      for (int64_t block = begin; block < end; ++block) {
        const int64_t at = block * kRows, n = std::min(kRows, S - at);
        for (int64_t s = 0; s < n; ++s) {
          const T* row = y + (at + s) * R;
          std::transform(row, row + R, wide.begin() + s * padded, [](T x) { return cast_one<T, double>(x); });
        }
        quadratic_form(wide.data(), panels.data(), padded, values);
        for (int64_t s = 0; s < n; ++s) {
          v[at + s] = values[s] < 0.0 ? 0.0 : values[s]; // keeps a NaN visible
        }
      }
    });
  });
  return out;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(loraforge, CPU, m) {
  m.impl("dcs_variance", TORCH_BOX(&dcs_variance));
}

} // namespace loraforge
