// Output variance of tokens as a quadratic form.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../common/cast.h"
#include "../common/operands.h"
#include "../common/isa.h"
#include "dcs.h"

namespace loraforge {
namespace {

constexpr int64_t kRows = 2 * kLanes; // tokens that one call of quadratic_form works on, one a lane
constexpr int64_t kTile = 4;          // entries of y that share the loads of the others

// v_s = y_s^T M y_s for kRows tokens. y: (R, kRows), token last; M: panels of kTile columns, each (R, kTile), symmetric,
// R a multiple of kTile. Only blocks on and right of the diagonal are multiplied.
LF_CLONES void quadratic_form(const double* y, const double* panels, int64_t R, double* v) {
  DoubleLanes total0 = {}, total1 = {};
  for (int64_t i = 0; i < R; i += kTile) {
    const double* panel = panels + i * R;
    DoubleLanes acc0[kTile] = {}, acc1[kTile] = {}, y0, y1;
    for (int64_t j = i + kTile; j < R; ++j) {
      load_lanes(y + j * kRows, y0);
      load_lanes(y + j * kRows + kLanes, y1);
      for (int64_t r = 0; r < kTile; ++r) {
        acc0[r] += panel[j * kTile + r] * y0;
        acc1[r] += panel[j * kTile + r] * y1;
      }
    }
    for (int64_t r = 0; r < kTile; ++r) {
      acc0[r] += acc0[r];
      acc1[r] += acc1[r];
    }
    for (int64_t j = i; j < i + kTile; ++j) {
      load_lanes(y + j * kRows, y0);
      load_lanes(y + j * kRows + kLanes, y1);
      for (int64_t r = 0; r < kTile; ++r) {
        acc0[r] += panel[j * kTile + r] * y0;
        acc1[r] += panel[j * kTile + r] * y1;
      }
    }
    for (int64_t r = 0; r < kTile; ++r) {
      load_lanes(y + (i + r) * kRows, y0);
      load_lanes(y + (i + r) * kRows + kLanes, y1);
      total0 += acc0[r] * y0;
      total1 += acc1[r] * y1;
    }
  }
  store_lanes(total0, v);
  store_lanes(total1, v + kLanes);
}

template <typename T>
std::vector<double> symmetric_panels(const T* m, int64_t R, int64_t padded) {
  std::vector<double> panels(static_cast<size_t>(padded * padded), 0.0);
  for (int64_t i = 0; i < R; ++i) {
    for (int64_t j = 0; j < R; ++j) {
      const double both = static_cast<double>(m[i * R + j]) + static_cast<double>(m[j * R + i]);
      panels[static_cast<size_t>((j / kTile) * kTile * padded + i * kTile + j % kTile)] = 0.5 * both;
    }
  }
  return panels;
}

Tensor dcs_variance(const Tensor& Y, const Tensor& M) {
  check_dcs_variance(Y, M);
  const Tensor rows = torch::stable::contiguous(Y), form = torch::stable::contiguous(M);
  Tensor out = torch::stable::new_empty(Y, {Y.size(0)}, ScalarType::Double);
  quadratic_rows(
      rows.const_data_ptr(), Y.scalar_type(), form.const_data_ptr(), M.scalar_type(), Y.size(0), Y.size(1),
      out.mutable_data_ptr<double>());
  return out;
}

} // namespace

void quadratic_rows(
    const void* Y, ScalarType dtype, const void* M, ScalarType form, int64_t S, int64_t R, double* v) {
  const int64_t padded = (R + kTile - 1) / kTile * kTile;
  const std::vector<double> panels = form == ScalarType::Float
      ? symmetric_panels(static_cast<const float*>(M), R, padded)
      : symmetric_panels(static_cast<const double*>(M), R, padded);
  for_float_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* y = static_cast<const T*>(Y);
    torch::stable::parallel_for(0, (S + kRows - 1) / kRows, 4, [&](int64_t begin, int64_t end) {
      std::vector<double> turned(static_cast<size_t>(padded * kRows), 0.0);
      double values[kRows];
      for (int64_t block = begin; block < end; ++block) {
        const int64_t at = block * kRows, n = std::min(kRows, S - at);
        for (int64_t s = 0; s < n; ++s) {
          for (int64_t r = 0; r < R; ++r) {
            turned[static_cast<size_t>(r * kRows + s)] = cast_one<T, double>(y[(at + s) * R + r]);
          }
        }
        quadratic_form(turned.data(), panels.data(), padded, values);
        for (int64_t s = 0; s < n; ++s) {
          v[at + s] = values[s] < 0.0 ? 0.0 : values[s]; // keeps a NaN visible
        }
      }
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(loraforge, CPU, m) {
  m.impl("dcs_variance", TORCH_BOX(&dcs_variance));
}

} // namespace loraforge
