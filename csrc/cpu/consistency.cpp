// Consistency loss of hidden states: one pass forward, one pass backward, no temporary of their size.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "../common/operands.h"
#include "../common/consistency.h"
#include "../common/float_lanes.h"

namespace loraforge {
namespace {

typedef int32_t IntWordLanes __attribute__((vector_size(32)));
typedef int64_t IntLongLanes __attribute__((vector_size(64)));

// 0 where the difference d is kept, x elsewhere: selected by bits, as 0 times infinity would be NaN.
template <typename Lanes>
LF_BODY void penalise(const Lanes& d, const Lanes& bound, Lanes& x) {
  using Ints = std::conditional_t<sizeof(Lanes) == 64, IntLongLanes, IntWordLanes>;
  x = reinterpret_cast<Lanes>(reinterpret_cast<Ints>(x) & ~reinterpret_cast<Ints>(d > bound));
}

LF_BODY void add_square(const FloatLanes& d, DoubleLanes& sum) {
  const DoubleLanes wide = __builtin_convertvector(d, DoubleLanes);
  sum += wide * wide;
}

LF_BODY void add_square(const DoubleLanes& d, DoubleLanes& sum) {
  sum += d * d;
}

template <typename T>
LF_BODY double cost_body(const T* p, const T* s, typename Computed<T>::type limit, int64_t n) {
  constexpr int64_t kWide = 4;
  using Lanes = typename Computed<T>::lanes;
  const Lanes bound = limit - Lanes{};
  DoubleLanes sums[kWide] = {};
  Lanes x, y, d;
  int64_t i = 0;
  for (; i + kWide * kLanes <= n; i += kWide * kLanes) {
    for (int64_t u = 0; u < kWide; ++u) {
      load_wide(p + i + u * kLanes, x);
      load_wide(s + i + u * kLanes, y);
      d = x - y;
      penalise(d, bound, d);
      add_square(d, sums[u]);
    }
  }
  for (; i < n; i += kLanes) {
    load_some(p + i, std::min(kLanes, n - i), x);
    load_some(s + i, std::min(kLanes, n - i), y);
    d = x - y;
    penalise(d, bound, d);
    add_square(d, sums[0]);
  }
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename T>
LF_BODY void slope_body(
    const T* p, const T* s, typename Computed<T>::type limit, typename Computed<T>::type factor, T* out, int64_t n) {
  using Lanes = typename Computed<T>::lanes;
  const Lanes bound = limit - Lanes{}, factors = factor - Lanes{};
  Lanes x, y, d;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    load_wide(p + i, x);
    load_wide(s + i, y);
    d = x - y;
    x = d * factors;
    penalise(d, bound, x);
    store_wide(x, out + i);
  }
  if (i < n) {
    load_some(p + i, n - i, x);
    load_some(s + i, n - i, y);
    d = x - y;
    x = d * factors;
    penalise(d, bound, x);
    store_some(x, n - i, out + i);
  }
}

#define LF_CONSISTENCY(T)                                                                                       \
  LF_CLONES double cost(const T* p, const T* s, Computed<T>::type limit, int64_t n) {                          \
    return cost_body(p, s, limit, n);                                                                          \
  }                                                                                                             \
  LF_CLONES void slope(const T* p, const T* s, Computed<T>::type limit, Computed<T>::type factor, T* out, int64_t n) { \
    slope_body(p, s, limit, factor, out, n);                                                                   \
  }
LF_CONSISTENCY(float)
LF_CONSISTENCY(double)
LF_CONSISTENCY(BFloat16)
LF_CONSISTENCY(Half)
#undef LF_CONSISTENCY

// Weights of tokens, whatever they are stored as.
class TokenWeights {
 public:
  explicit TokenWeights(const std::optional<Tensor>& mask) {
    if (mask) {
      kept_ = torch::stable::contiguous(*mask);
      data_ = kept_->const_data_ptr();
      dtype_ = kept_->scalar_type();
    }
  }
  bool all_one() const {
    return data_ == nullptr;
  }
  double operator[](int64_t token) const {
    if (data_ == nullptr) {
      return 1.0;
    }
    switch (dtype_) {
      case ScalarType::Bool:
        return static_cast<const bool*>(data_)[token] ? 1.0 : 0.0;
      case ScalarType::Float:
        return static_cast<const float*>(data_)[token];
      default:
        return static_cast<const double*>(data_)[token];
    }
  }

 private:
  std::optional<Tensor> kept_;
  const void* data_ = nullptr;
  ScalarType dtype_ = ScalarType::Double;
};

struct Operands {
  Tensor P, S;
  int64_t tokens, width, rows, blocks; // rows: tokens of a block. Fixed blocks: the thread count cannot change a bit
};

Operands checked(
    const char* op, const Tensor& P, const Tensor& S, const std::optional<Tensor>& mask, int64_t rule,
    const std::optional<Tensor>& unit) {
  check_consistency(op, P, S, mask, rule, unit);
  constexpr int64_t kEntries = 1 << 16;
  const int64_t rows = std::max<int64_t>(1, kEntries / std::max<int64_t>(1, P.size(1)));
  return {torch::stable::contiguous(P), torch::stable::contiguous(S), P.size(0), P.size(1), rows,
          (P.size(0) + rows - 1) / rows};
}

double scaled(double threshold, const std::optional<Tensor>& unit) {
  return unit ? threshold * *unit->const_data_ptr<double>() : threshold;
}

Tensor consistency_forward(
    const Tensor& P, const Tensor& S, std::optional<Tensor> mask, int64_t rule, double threshold,
    std::optional<Tensor> unit) {
  const Operands given = checked("consistency_forward", P, S, mask, rule, unit);
  const TokenWeights weights(mask);
  const double limit = scaled(threshold, unit);
  std::vector<double> partial(static_cast<size_t>(given.blocks), 0.0);
  for_float_type(P.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto bound = kept_above<typename Computed<T>::type>(static_cast<int>(rule), limit);
    const T* p = static_cast<const T*>(given.P.const_data_ptr());
    const T* s = static_cast<const T*>(given.S.const_data_ptr());
    torch::stable::parallel_for(0, given.blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * given.rows, last = std::min(first + given.rows, given.tokens);
        double& sum = partial[static_cast<size_t>(block)];
        if (weights.all_one()) {
          sum = cost(p + first * given.width, s + first * given.width, bound, (last - first) * given.width);
          continue;
        }
        for (int64_t token = first; token < last; ++token) {
          const double weight = weights[token];
          if (weight != 0.0) { // what lies in other rows is never read: NaN times 0 would be NaN
            sum += weight * cost(p + token * given.width, s + token * given.width, bound, given.width);
          }
        }
      }
    });
  });
  Tensor out = torch::stable::new_empty(P, {}, ScalarType::Double);
  double total = 0.0;
  for (double part : partial) {
    total += part;
  }
  *out.mutable_data_ptr<double>() = total;
  return out;
}

Tensor consistency_backward(
    const Tensor& grad, const Tensor& P, const Tensor& S, std::optional<Tensor> mask, int64_t rule, double threshold,
    std::optional<Tensor> unit) {
  const Operands given = checked("consistency_backward", P, S, mask, rule, unit);
  check_dim("consistency_backward", "grad", grad, 0, "()");
  check_dtype("consistency_backward", "grad", grad, {ScalarType::Double});
  const TokenWeights weights(mask);
  const double limit = scaled(threshold, unit), twice = 2.0 * *grad.const_data_ptr<double>();
  Tensor out = torch::stable::new_empty(P, {given.tokens, given.width}, P.scalar_type());
  for_float_type(P.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using Wide = typename Computed<T>::type;
    const Wide bound = kept_above<Wide>(static_cast<int>(rule), limit);
    const T* p = static_cast<const T*>(given.P.const_data_ptr());
    const T* s = static_cast<const T*>(given.S.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, given.blocks, 1, [&](int64_t begin, int64_t end) {
      const int64_t last = std::min(end * given.rows, given.tokens);
      for (int64_t token = begin * given.rows; token < last; ++token) {
        const int64_t at = token * given.width;
        const double weight = weights[token];
        if (weight == 0.0) {
          std::memset(static_cast<void*>(to + at), 0, static_cast<size_t>(given.width) * sizeof(T));
        } else {
          slope(p + at, s + at, bound, static_cast<Wide>(twice * weight), to + at, given.width);
        }
      }
    });
  });
  return out;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(loraforge, CPU, m) {
  m.impl("consistency_forward", TORCH_BOX(&consistency_forward));
  m.impl("consistency_backward", TORCH_BOX(&consistency_backward));
}

} // namespace loraforge
