// Anderson mixing on flat histories: dot products with double accumulation, and the mix in one pass over memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../common/operands.h"
#include "../common/isa.h"
#include "../common/layout.h"

namespace loraforge {
namespace {

// Sums are taken over blocks of a fixed size and then over blocks in order: the thread count cannot change a bit.
constexpr int64_t kBlock = 2048;

template <typename T>
LF_BODY double dot_body(const T* x, const T* y, int64_t n) {
  constexpr int64_t kUnroll = 4;
  DoubleLanes acc[kUnroll] = {};
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    for (int64_t u = 0; u < kUnroll; ++u) {
      DoubleLanes a, b;
      load_lanes(x + i + u * kLanes, a);
      load_lanes(y + i + u * kLanes, b);
      acc[u] += a * b;
    }
  }
  double tail = 0.0;
  for (; i < n; ++i) {
    tail += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  }
  return sum_lanes((acc[0] + acc[1]) + (acc[2] + acc[3])) + tail;
}

LF_CLONES double dot(const float* x, const float* y, int64_t n) {
  return dot_body(x, y, n);
}
LF_CLONES double dot(const double* x, const double* y, int64_t n) {
  return dot_body(x, y, n);
}

template <typename T>
LF_BODY void mix_body(
    const T* X, const T* F, int64_t ldx, int64_t ldf, int64_t m, const double* a, const double* b, T* out, int64_t n) {
  constexpr int64_t kWide = 4; // registers of lanes a row and turn: two cache lines of float32, which memory likes
  // 2 m rows are more streams than the processor's own prefetcher follows: asking ahead takes a tenth off.
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T)), kAhead = 16 * kLine;
  int64_t i = 0;
  for (; i + kWide * kLanes <= n; i += kWide * kLanes) {
    DoubleLanes acc[kWide] = {}, x, f;
    for (int64_t j = 0; j < m; ++j) {
      for (int64_t u = 0; u < kWide * kLanes; u += kLine) {
        __builtin_prefetch(X + j * ldx + i + kAhead + u);
        __builtin_prefetch(F + j * ldf + i + kAhead + u);
      }
      for (int64_t u = 0; u < kWide; ++u) {
        load_lanes(X + j * ldx + i + u * kLanes, x);
        load_lanes(F + j * ldf + i + u * kLanes, f);
        acc[u] += a[j] * x + b[j] * f;
      }
    }
    for (int64_t u = 0; u < kWide; ++u) {
      store_lanes(acc[u], out + i + u * kLanes);
    }
  }
  for (; i < n; ++i) {
    double acc = 0.0;
    for (int64_t j = 0; j < m; ++j) {
      acc += a[j] * static_cast<double>(X[j * ldx + i]) + b[j] * static_cast<double>(F[j * ldf + i]);
    }
    out[i] = static_cast<T>(acc);
  }
}

LF_CLONES void mix(
    const float* X, const float* F, int64_t ldx, int64_t ldf, int64_t m, const double* a, const double* b, float* out,
    int64_t n) {
  mix_body(X, F, ldx, ldf, m, a, b, out, n);
}
LF_CLONES void mix(
    const double* X, const double* F, int64_t ldx, int64_t ldf, int64_t m, const double* a, const double* b, double* out,
    int64_t n) {
  mix_body(X, F, ldx, ldf, m, a, b, out, n);
}

template <typename T>
void dots_into(const Tensor& H, const Tensor& f, double* out) {
  const int64_t m = H.size(0), P = H.size(1), stride = H.stride(0), blocks = (P + kBlock - 1) / kBlock;
  const T* h = H.const_data_ptr<T>();
  const T* v = f.const_data_ptr<T>();
  std::vector<double> partial(static_cast<size_t>(blocks * (m + 1)));
  torch::stable::parallel_for(0, blocks, 16, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t at = block * kBlock, n = std::min(kBlock, P - at);
      double* row = partial.data() + block * (m + 1);
      for (int64_t j = 0; j < m; ++j) {
        row[j] = dot(h + j * stride + at, v + at, n);
      }
      row[m] = dot(v + at, v + at, n);
    }
  });
  std::fill(out, out + m + 1, 0.0);
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t j = 0; j <= m; ++j) {
      out[j] += partial[static_cast<size_t>(block * (m + 1) + j)];
    }
  }
}

Tensor anderson_dots(const Tensor& H, const Tensor& f) {
  check_anderson_dots(H, f);
  const Tensor rows = unit_stride(H), vector = torch::stable::contiguous(f);
  Tensor out = torch::stable::new_empty(f, {H.size(0) + 1}, ScalarType::Double);
  double* values = out.mutable_data_ptr<double>();
  if (H.scalar_type() == ScalarType::Float) {
    dots_into<float>(rows, vector, values);
  } else {
    dots_into<double>(rows, vector, values);
  }
  return out;
}

template <typename T>
void mix_into(const Tensor& X, const Tensor& F, const double* a, const double* b, const Tensor& out) {
  const int64_t m = X.size(0), P = X.size(1), blocks = (P + kBlock - 1) / kBlock;
  const T* x = X.const_data_ptr<T>();
  const T* f = F.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, blocks, 16, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * kBlock, n = std::min(end * kBlock, P) - at;
    mix(x + at, f + at, X.stride(0), F.stride(0), m, a, b, to + at, n);
  });
}

void anderson_mix(const Tensor& X, const Tensor& F, const Tensor& a, double beta, Tensor out) {
  check_anderson_mix(X, F, a, out);
  const Tensor x = unit_stride(X), f = unit_stride(F), c = torch::stable::contiguous(a);
  const double* weights = c.const_data_ptr<double>();
  std::vector<double> damped(static_cast<size_t>(X.size(0)));
  for (size_t j = 0; j < damped.size(); ++j) {
    damped[j] = weights[j] * beta;
  }
  Tensor target = out.is_contiguous() ? out : torch::stable::new_empty(out, {out.size(0)});
  if (X.scalar_type() == ScalarType::Float) {
    mix_into<float>(x, f, weights, damped.data(), target);
  } else {
    mix_into<double>(x, f, weights, damped.data(), target);
  }
  if (!out.is_contiguous()) {
    torch::stable::copy_(out, target);
  }
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(loraforge, CPU, m) {
  m.impl("anderson_dots", TORCH_BOX(&anderson_dots));
  m.impl("anderson_mix", TORCH_BOX(&anderson_mix));
}

} // namespace loraforge
