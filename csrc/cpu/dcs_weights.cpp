// Weights of tokens from their output variances: median, MAD, floor of the effective sample size, mean 1.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "../common/operands.h"
#include "../common/isa.h"
#include "dcs.h"

namespace loraforge {
namespace {

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
  check_dcs_weights(V);
  const Tensor variances = torch::stable::contiguous(V);
  Tensor weights = torch::stable::new_empty(V, {V.size(0)}, ScalarType::Double);
  Tensor stats = torch::stable::new_empty(V, {3}, ScalarType::Double);
  weights_of(
      variances.const_data_ptr<double>(), V.size(0), {scale, min_ess, excess, mad_consistent},
      weights.mutable_data_ptr<double>(), stats.mutable_data_ptr<double>());
  return {weights, stats};
}

} // namespace

void weights_of(const double* v, int64_t S, const DcsOptions& options, double* w, double* stats) {
  stats[0] = 0.0, stats[1] = 1.0, stats[2] = 1.0;
  if (S == 0) {
    return;
  }
  if (!std::all_of(v, v + S, [](double x) { return x >= 0.0 && x <= DBL_MAX; })) {
    std::fill(w, w + S, NAN);
    std::fill(stats, stats + 3, NAN);
    return;
  }
  const bool excess = options.excess;
  std::vector<double> d(v, v + S);
  const double middle = median(d);
  std::transform(v, v + S, d.begin(), [&](double x) { return std::fabs(x - middle); });
  const double sigma = median(d) * options.scale * (excess || options.mad_consistent ? 1.4826 : 1.0);
  const double origin = excess ? middle : *std::min_element(v, v + S);
  std::transform(v, v + S, d.begin(), [&](double x) { return std::max(0.0, x - origin); });
  const double top = *std::max_element(d.begin(), d.end());
  double kappa0 = 0.0, kappa = 0.0;
  if (top > 0.0) {
    // In units of the largest distance nothing over- or underflows; sigma = 0 is the limit of small sigma.
    std::transform(d.begin(), d.end(), d.begin(), [&](double x) { return x / top; });
    kappa0 = std::min(excess ? top / sigma : top / sigma / sigma, DBL_MAX);
    kappa = floored(d, kappa0, options.min_ess);
  }
  const Sums sums = all_sums(d, kappa);
  const double factor = static_cast<double>(S) / sums.w;
  torch::stable::parallel_for(0, (S + kBlock - 1) / kBlock, 4, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * kBlock, n = std::min(end * kBlock, S) - at;
    tilted_weights(d.data() + at, kappa, factor, w + at, n);
  });
  stats[0] = sigma;
  stats[1] = kappa == kappa0 ? 1.0 : std::min(kappa0 / kappa, DBL_MAX);
  stats[2] = sums.w / sums.ww * (sums.w / static_cast<double>(S));
}

STABLE_TORCH_LIBRARY_IMPL(loraforge, CPU, m) {
  m.impl("dcs_weights", TORCH_BOX(&dcs_weights));
}

} // namespace loraforge
