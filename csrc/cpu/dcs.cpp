// Output variance of tokens as a quadratic form, and the weights made from it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "../common/cast.h"
#include "../common/checks.h"
#include "../common/isa.h"

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
std::vector<double> symmetric_panels(const Tensor& M, int64_t R, int64_t padded) {
  const T* m = M.const_data_ptr<T>();
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
  check_dim("dcs_variance", "Y", Y, 2, "(S, R)");
  check_dim("dcs_variance", "M", M, 2, "(R, R)");
  check_dtype(
      "dcs_variance", "Y", Y, {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half});
  check_dtype("dcs_variance", "M", M, {ScalarType::Float, ScalarType::Double});
  check_size("dcs_variance", "M", M, 0, Y.size(1), "R of Y");
  check_size("dcs_variance", "M", M, 1, Y.size(1), "R of Y");
  const Tensor rows = torch::stable::contiguous(Y), form = torch::stable::contiguous(M);
  const int64_t S = Y.size(0), R = Y.size(1), padded = (R + kTile - 1) / kTile * kTile;
  const std::vector<double> panels = M.scalar_type() == ScalarType::Float ? symmetric_panels<float>(form, R, padded)
                                                                          : symmetric_panels<double>(form, R, padded);
  Tensor out = torch::stable::new_empty(Y, {S}, ScalarType::Double);
  double* v = out.mutable_data_ptr<double>();
  for_float_type(Y.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* y = static_cast<const T*>(rows.const_data_ptr());
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
  return out;
}

typedef long long IntLanes __attribute__((vector_size(64)));

// exp of x <= 0 to about one unit in the last place: x = n ln 2 + r, Taylor to r^13 on |r| <= ln(2)/2; 0 below -708.
LF_BODY void exp_lanes(DoubleLanes x, DoubleLanes& out) {
  constexpr double kMagic = 6755399441055744.0; // 1.5 * 2^52: the low bits of x + kMagic hold round(x)
  const IntLanes live = x >= -708.0;
  x = reinterpret_cast<DoubleLanes>(reinterpret_cast<IntLanes>(x) & live);
  const DoubleLanes shifted = x * 1.4426950408889634 + kMagic, n = shifted - kMagic;
  const DoubleLanes r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  DoubleLanes p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const IntLanes scaled = reinterpret_cast<IntLanes>(p) + (reinterpret_cast<IntLanes>(shifted) << 52);
  out = reinterpret_cast<DoubleLanes>(scaled & live);
}

struct Sums {
  double w;
  double ww;
};

LF_CLONES Sums tilted_sums(const double* d, double kappa, int64_t n) {
  DoubleLanes w = {}, ww = {}, x, e;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    load_lanes(d + i, x);
    exp_lanes(x * -kappa, e);
    w += e;
    ww += e * e;
  }
  Sums sums{sum_lanes(w), sum_lanes(ww)};
  for (; i < n; ++i) {
    const double one = std::exp(-kappa * d[i]);
    sums.w += one;
    sums.ww += one * one;
  }
  return sums;
}

LF_CLONES void tilted_weights(const double* d, double kappa, double factor, double* w, int64_t n) {
  DoubleLanes x, e;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    load_lanes(d + i, x);
    exp_lanes(x * -kappa, e);
    store_lanes(e * factor, w + i);
  }
  for (; i < n; ++i) {
    w[i] = std::exp(-kappa * d[i]) * factor;
  }
}

constexpr int64_t kBlock = 4096; // fixed blocks, summed in order: the thread count cannot change a bit

Sums all_sums(const std::vector<double>& d, double kappa) {
  const int64_t S = static_cast<int64_t>(d.size()), blocks = (S + kBlock - 1) / kBlock;
  std::vector<Sums> partial(static_cast<size_t>(blocks));
  torch::stable::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      partial[static_cast<size_t>(b)] = tilted_sums(d.data() + b * kBlock, kappa, std::min(kBlock, S - b * kBlock));
    }
  });
  Sums sums{0.0, 0.0};
  for (const Sums& part : partial) {
    sums.w += part.w;
    sums.ww += part.ww;
  }
  return sums;
}

double ess_share(const std::vector<double>& d, double kappa) {
  const Sums sums = all_sums(d, kappa);
  return sums.w / sums.ww * (sums.w / static_cast<double>(d.size()));
}

// Average of the two middle values where their number is even. Reorders its argument.
double median(std::vector<double>& values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  const double upper = *middle;
  return values.size() % 2 ? upper : 0.5 * (*std::max_element(values.begin(), middle)) + 0.5 * upper;
}

// The largest kappa <= kappa0 whose share of effective samples reaches the floor (it falls as kappa grows).
double floored(const std::vector<double>& d, double kappa0, double min_ess) {
  constexpr double kGrow = 4.0;
  const double target = std::min(min_ess, 1.0 - 1e-12); // rounding keeps a share of exactly 1 out of reach
  if (min_ess <= 0.0 || ess_share(d, kappa0) >= target) {
    return kappa0;
  }
  double low = std::min(1.0, 0.5 * kappa0), high = kappa0;
  while (ess_share(d, low) < target) {
    high = low;
    low /= kGrow;
  }
  while (low * kGrow < high) {
    const double next = low * kGrow;
    if (ess_share(d, next) < target) {
      high = next;
      break;
    }
    low = next;
  }
  for (int step = 0; step < 60 && high / low > 1.0 + 1e-12; ++step) {
    const double mid = low * std::sqrt(high / low);
    (ess_share(d, mid) >= target ? low : high) = mid;
  }
  return low;
}

std::tuple<Tensor, Tensor> dcs_weights(
    const Tensor& V, double scale, double min_ess, bool excess, bool mad_consistent) {
  check_dim("dcs_weights", "V", V, 1, "(S,)");
  check_dtype("dcs_weights", "V", V, {ScalarType::Double});
  const Tensor variances = torch::stable::contiguous(V);
  const int64_t S = V.size(0);
  Tensor weights = torch::stable::new_empty(V, {S}, ScalarType::Double);
  Tensor stats = torch::stable::new_empty(V, {3}, ScalarType::Double);
  double* report = stats.mutable_data_ptr<double>();
  report[0] = 0.0, report[1] = 1.0, report[2] = 1.0;
  if (S == 0) {
    return {weights, stats};
  }
  const double* v = variances.const_data_ptr<double>();
  std::vector<double> d(v, v + S);
  const double middle = median(d);
  std::transform(v, v + S, d.begin(), [&](double x) { return std::fabs(x - middle); });
  const double sigma = median(d) * scale * (excess || mad_consistent ? 1.4826 : 1.0);
  const double origin = excess ? middle : *std::min_element(v, v + S);
  std::transform(v, v + S, d.begin(), [&](double x) { return std::max(0.0, x - origin); });
  const double top = *std::max_element(d.begin(), d.end());
  double kappa0 = 0.0, kappa = 0.0;
  if (top > 0.0) {
    // In units of the largest distance nothing over- or underflows; sigma = 0 is the limit of small sigma.
    std::transform(d.begin(), d.end(), d.begin(), [&](double x) { return x / top; });
    kappa0 = std::min(excess ? top / sigma : top / sigma / sigma, DBL_MAX);
    kappa = floored(d, kappa0, min_ess);
  }
  const Sums sums = all_sums(d, kappa);
  const double factor = static_cast<double>(S) / sums.w;
  double* w = weights.mutable_data_ptr<double>();
  torch::stable::parallel_for(0, (S + kBlock - 1) / kBlock, 4, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * kBlock, n = std::min(end * kBlock, S) - at;
    tilted_weights(d.data() + at, kappa, factor, w + at, n);
  });
  report[0] = sigma;
  report[1] = kappa == kappa0 ? 1.0 : kappa0 / kappa;
  report[2] = sums.w / sums.ww * (sums.w / static_cast<double>(S));
  return {weights, stats};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(loraforge, CPU, m) {
  m.impl("dcs_variance", TORCH_BOX(&dcs_variance));
  m.impl("dcs_weights", TORCH_BOX(&dcs_weights));
}

} // namespace loraforge
