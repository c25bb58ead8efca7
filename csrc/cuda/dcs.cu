// Dynamic calibration sampling: one block a module does all that follows from its variances, so that nothing waits for
// the host between the medians, the search for tau and the weights. Sums have a fixed order.
#include "dcs.h"

#include <cfloat>
#include <cmath>

#include "dcs_forms.cuh"
#include "dcs_select.cuh"
#include "device.cuh"

namespace loraforge::cuda {
namespace {

constexpr int64_t kFillsGpu = 64; // modules from which on a block each keeps a GPU busy
constexpr double kNaN = NAN;

struct Sums {
  double w, ww;
};

// Sums of w = exp(-kappa d) and of its squares. Calls in turn use two scratch areas, so one barrier each is enough.
class Tilted {
 public:
  __device__ __forceinline__ Tilted(const double* d, int64_t n, Sums (*scratch)[kDcsWarps])
      : d_(d), n_(n), scratch_(scratch) {}

  __device__ Sums sums(double kappa) {
    Sums mine{0.0, 0.0};
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < n_; i += kDcsThreads) {
      const double w = exp(-kappa * d_[i]);
      mine.w += w;
      mine.ww += w * w;
    }
    mine = {warp_sum(mine.w), warp_sum(mine.ww)};
    Sums* row = scratch_[turn_];
    turn_ = 1 - turn_;
    if (threadIdx.x % kWarp == 0) {
      row[threadIdx.x / kWarp] = mine;
    }
    __syncthreads();
    Sums all{0.0, 0.0};
    for (int warp = 0; warp < kDcsWarps; ++warp) {
      all.w += row[warp].w;
      all.ww += row[warp].ww;
    }
    return all;
  }

  __device__ __forceinline__ double share(const Sums& sums) const {
    return sums.w / sums.ww * (sums.w / static_cast<double>(n_));
  }

  __device__ __forceinline__ double share(double kappa) {
    return share(sums(kappa));
  }

 private:
  const double* d_;
  int64_t n_;
  Sums (*scratch_)[kDcsWarps];
  int turn_ = 0;
};

// The largest kappa <= kappa0 whose share of effective samples reaches the floor (it falls as kappa grows).
__device__ double floored(Tilted& tilted, double kappa0, double min_ess) {
  constexpr double kGrow = 4.0;
  const double reachable = 1.0 - 1e-12; // rounding keeps a share of exactly 1 out of reach
  const double target = min_ess < reachable ? min_ess : reachable;
  if (min_ess <= 0.0 || tilted.share(kappa0) >= target) {
    return kappa0;
  }
  double low = 0.5 * kappa0 < 1.0 ? 0.5 * kappa0 : 1.0, high = kappa0;
  while (tilted.share(low) < target) {
    high = low;
    low /= kGrow;
  }
  while (low * kGrow < high) {
    const double next = low * kGrow;
    if (tilted.share(next) < target) {
      high = next;
      break;
    }
    low = next;
  }
  for (int step = 0; step < 60 && high / low > 1.0 + 1e-12; ++step) {
    const double mid = low * sqrt(high / low);
    (tilted.share(mid) >= target ? low : high) = mid;
  }
  return low;
}

__device__ __forceinline__ void fill(double* w, int64_t from, int64_t to, double value) {
  for (int64_t i = from + threadIdx.x; i < to; i += kDcsThreads) {
    w[i] = value;
  }
}

__device__ __forceinline__ void report(double* stats, double sigma, double tau, double ess) {
  if (threadIdx.x == 0) {
    stats[0] = sigma, stats[1] = tau, stats[2] = ess;
  }
}

// Weights w of n variances V, which may be the same memory: a thread writes only entries that it alone reads.
__device__ void weigh(const double* V, int64_t n, int64_t S, const DcsSettings& settings, double* w, double* stats) {
  __shared__ Sums scratch[2][kDcsWarps];
  if (n < 0 || n > S) {
    fill(w, 0, S, kNaN);
    return report(stats, kNaN, kNaN, kNaN);
  }
  fill(w, n, S, 0.0);
  if (n == 0) {
    return report(stats, 0.0, 1.0, 1.0);
  }
  const auto variance = [&](int64_t i) { return bits_of(V[i] + 0.0); }; // -0 becomes 0
  const Extremes within = extremes(variance, n);
  if (within.most >= kInfinityBits) { // as unsigned bits, NaN and every negative number lie above infinity
    fill(w, 0, n, kNaN);
    return report(stats, kNaN, kNaN, kNaN);
  }
  const double middle = median(variance, n, within);
  const auto distance = [&](int64_t i) { return bits_of(fabs(V[i] - middle)); };
  const double consistent = settings.excess || settings.mad_consistent ? 1.4826 : 1.0;
  const double sigma = median(distance, n, extremes(distance, n)) * settings.scale * consistent;
  const double origin = settings.excess ? middle : from_bits(within.least);
  const double farthest = from_bits(within.most) - origin, top = farthest > 0.0 ? farthest : 0.0;
  for (int64_t i = threadIdx.x; i < n; i += kDcsThreads) {
    const double d = V[i] - origin;
    w[i] = top > 0.0 && d > 0.0 ? d / top : 0.0; // in units of the largest distance nothing over- or underflows
  }
  Tilted tilted(w, n, scratch);
  double kappa0 = 0.0, kappa = 0.0;
  if (top > 0.0) {
    kappa0 = settings.excess ? top / sigma : top / sigma / sigma; // sigma = 0: the limit of small sigma
    kappa0 = kappa0 < DBL_MAX ? kappa0 : DBL_MAX;
    kappa = floored(tilted, kappa0, settings.min_ess);
  }
  const Sums sums = tilted.sums(kappa);
  const double factor = static_cast<double>(n) / sums.w, tau = kappa == kappa0 ? 1.0 : kappa0 / kappa;
  for (int64_t i = threadIdx.x; i < n; i += kDcsThreads) {
    w[i] = exp(-kappa * w[i]) * factor;
  }
  report(stats, sigma, tau < DBL_MAX ? tau : DBL_MAX, tilted.share(sums));
}

__device__ __forceinline__ int64_t count_of(const DcsRows& rows, int64_t module) {
  return rows.counts == nullptr ? rows.S : rows.counts[module];
}

// Variances of the module's rows [first, first + 64).
template <typename T>
__device__ __forceinline__ void tile_of(
    const DcsRows& rows, const DcsForms& forms, int64_t module, int64_t first, int64_t count, double* v) {
  const int64_t left = count - first, R = forms.R, entry = forms.form == Float::f64 ? 8 : 4;
  const auto* M = static_cast<const unsigned char*>(forms.M) + module * R * R * entry;
  quadratic_rows(
      static_cast<const T*>(forms.Y) + (module * rows.S + first) * R, left < kFormRows ? left : kFormRows, R, M,
      forms.form, v + module * rows.S + first);
}

template <typename T>
__global__ void __launch_bounds__(kDcsThreads, 2)
    variance_kernel(DcsRows rows, DcsForms forms, int64_t tiles, double* v) {
  const int64_t module = blockIdx.x / tiles, first = blockIdx.x % tiles * kFormRows, count = count_of(rows, module);
  if (first < count && count <= rows.S) {
    tile_of<T>(rows, forms, module, first, count, v);
  }
}

__global__ void __launch_bounds__(kDcsThreads, 2)
    weights_kernel(DcsRows rows, const double* V, DcsSettings settings, double* w, double* stats) {
  const int64_t module = blockIdx.x, at = module * rows.S;
  weigh(V + at, count_of(rows, module), rows.S, settings, w + at, stats + 3 * module);
}

template <typename T>
__global__ void __launch_bounds__(kDcsThreads, 2)
    batch_kernel(DcsRows rows, DcsForms forms, DcsSettings settings, double* w, double* stats) {
  const int64_t module = blockIdx.x, at = module * rows.S, count = count_of(rows, module);
  for (int64_t first = 0; first < count && count <= rows.S; first += kFormRows) {
    tile_of<T>(rows, forms, module, first, count, w);
  }
  weigh(w + at, count, rows.S, settings, w + at, stats + 3 * module);
}

} // namespace

int dcs_variance(const DcsRows& rows, const DcsForms& forms, double* v, cudaStream_t stream) {
  const int64_t tiles = (rows.S + kFormRows - 1) / kFormRows;
  if (rows.b * tiles == 0) {
    return 0;
  }
  return for_float(forms.kind, [&](auto zero) {
    using T = decltype(zero);
    LF_LAUNCH(
        variance_kernel<T>, static_cast<unsigned>(rows.b * tiles), kDcsThreads, 0, stream, rows, forms, tiles, v);
    return launched();
  });
}

int dcs_weights(
    const DcsRows& rows, const double* V, const DcsSettings& settings, double* w, double* stats, cudaStream_t stream) {
  if (rows.b == 0) {
    return 0;
  }
  LF_LAUNCH(weights_kernel, static_cast<unsigned>(rows.b), kDcsThreads, 0, stream, rows, V, settings, w, stats);
  return launched();
}

int dcs_batch(
    const DcsRows& rows, const DcsForms& forms, const DcsSettings& settings, double* w, double* stats,
    cudaStream_t stream) {
  if (rows.b < kFillsGpu) {
    const int code = dcs_variance(rows, forms, w, stream);
    return code != 0 ? code : dcs_weights(rows, w, settings, w, stats, stream);
  }
  return for_float(forms.kind, [&](auto zero) {
    using T = decltype(zero);
    LF_LAUNCH(
        batch_kernel<T>, static_cast<unsigned>(rows.b), kDcsThreads, 0, stream, rows, forms, settings, w, stats);
    return launched();
  });
}

} // namespace loraforge::cuda
