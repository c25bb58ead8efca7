// Entry-wise rules on the deltas of all adapters: entries are formed, dropped and joined in the cache.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "entry_rules.h"
#include "entry_tiles.h"

namespace loraforge {
namespace {

// sum_i w_i x_i over `count` tiles that lie `step` entries apart, each a multiply-add where the processor has one.
template <typename T>
LF_BODY void sum_body(const T* x, int64_t step, const T* weights, int64_t count, int64_t n, T* out) {
  using V = typename Lanes<T>::Vector;
  for (int64_t at = 0; at < n; at += Lanes<T>::kCount) {
    V sum = {}, value;
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(&value, x + i * step + at, sizeof(value));
      sum += weights[i] * value;
    }
    std::memcpy(out + at, &sum, sizeof(sum));
  }
}

LF_CLONES void sum(const float* x, int64_t step, const float* weights, int64_t count, int64_t n, float* out) {
  sum_body(x, step, weights, count, n, out);
}
LF_CLONES void sum(const double* x, int64_t step, const double* weights, int64_t count, int64_t n, double* out) {
  sum_body(x, step, weights, count, n, out);
}

// (S + g T) / (z + g c) with S = sum x, T = sum |x|, c = sum sign(x), z = sum |sign(x)| and g = sign(S).
template <typename T>
LF_BODY void elect_body(const T* x, int64_t step, int64_t count, int64_t n, T* out) {
  using V = typename Lanes<T>::Vector;
  using M = typename Lanes<T>::Mask;
  for (int64_t at = 0; at < n; at += Lanes<T>::kCount) {
    V total = {}, sizes = {}, value;
    M signs = {}, voters = {};
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(&value, x + i * step + at, sizeof(value));
      const M up = value > T(0), down = value < T(0); // -1 where it holds
      total += value;
      sizes += down ? -value : value;
      signs += down - up;
      voters -= up | down;
    }
    const M up = total > T(0), down = total < T(0);
    const V agreed = total + (V)(((M)sizes & up) | ((M)-sizes & down));
    M agreeing = voters + ((signs & up) | (-signs & down));
    agreeing = agreeing > 1 ? agreeing : agreeing - agreeing + 1;
    const V mean = agreed / __builtin_convertvector(agreeing, V);
    std::memcpy(out + at, &mean, sizeof(mean));
  }
}

LF_CLONES void elect(const float* x, int64_t step, int64_t count, int64_t n, float* out) {
  elect_body(x, step, count, n, out);
}
LF_CLONES void elect(const double* x, int64_t step, int64_t count, int64_t n, double* out) {
  elect_body(x, step, count, n, out);
}

// Forms a tile of every source, applies its rule and writes what they are joined to.
template <typename T>
class Join {
 public:
  Join(const std::vector<Source>& sources, const std::vector<Rule>& rules, uint64_t first, bool electing, T* out)
      : sources_(sources), rules_(rules), first_(first), electing_(electing), out_(out),
        tiles_((sources.size() + 1) * kTile) {
    for (const Rule& rule : rules) {
      weights_.push_back(static_cast<T>(rule.weight));
    }
  }

  void operator()(const double* panel, const Place& place) {
    const int64_t count = static_cast<int64_t>(sources_.size()), entries = place.rows * place.strip;
    T* tile = tiles_.data();
    // The lines of the result lie far apart: they come while the entries are formed.
    for (int64_t i = 0; i < place.rows; ++i) {
      for (int64_t line = 0; line < place.width; line += Lanes<T>::kCount) {
        __builtin_prefetch(out_ + (place.row + i) * place.n + place.at + line, 1);
      }
    }
    for (size_t i = 0; i < sources_.size(); ++i, tile += kTile) {
      fill(sources_[i], panel, place, tile);
      apply(tile, rules_[i], place, first_, electing_);
      panel += sources_[i].r * kStrip;
    }
    if (electing_) {
      elect(tiles_.data(), kTile, count, entries, tile);
    } else {
      sum(tiles_.data(), kTile, weights_.data(), count, entries, tile);
    }
    for (int64_t i = 0; i < place.rows; ++i) {
      std::copy_n(tile + i * place.strip, place.width, out_ + (place.row + i) * place.n + place.at);
    }
  }

  void done() {}

 private:
  const std::vector<Source>& sources_;
  const std::vector<Rule>& rules_;
  uint64_t first_;
  bool electing_;
  T* out_;
  std::vector<T> tiles_, weights_;
};

template <typename T>
void merge_into(
    const std::vector<Source>& sources, const std::vector<Rule>& rules, uint64_t first, bool electing, Tensor& out) {
  T* result = out.mutable_data_ptr<T>();
  for_tiles(sources, out.size(0), out.size(1), [&] { return Join<T>(sources, rules, first, electing, result); });
}

Tensor entry_merge(
    std::vector<Tensor> left, std::vector<Tensor> right, std::vector<double> scaling, std::vector<double> weights,
    std::vector<double> low, std::vector<double> high, std::vector<int64_t> keys, int64_t limit, double gain,
    int64_t first, bool electing, ScalarType dtype) {
  check_entry_merge(left, right, scaling, weights, low, high, keys, limit, dtype);
  const size_t count = left.size();
  std::vector<Source> sources;
  std::vector<Rule> rules;
  for (size_t i = 0; i < count; ++i) {
    sources.push_back(source_of(left[i], right.empty() ? nullptr : &right[i], scaling[i]));
    const PhiloxKey key{static_cast<uint64_t>(keys[2 * i]), static_cast<uint64_t>(keys[2 * i + 1])};
    rules.push_back({low[i], high[i], key, static_cast<uint64_t>(limit), gain, weights[i]});
  }
  const int64_t t = left[0].size(0), n = sources[0].right.size(1);
  Tensor out = torch::stable::new_empty(left[0], {t, n}, dtype);
  const uint64_t entry = static_cast<uint64_t>(first) * static_cast<uint64_t>(n);
  if (dtype == ScalarType::Float) {
    merge_into<float>(sources, rules, entry, electing, out);
  } else {
    merge_into<double>(sources, rules, entry, electing, out);
  }
  return out;
}

template <typename T>
void drop_rows(Tensor& tile, const Rule& rule, uint64_t first) {
  const int64_t t = tile.size(0), n = tile.size(1), ld = tile.stride(0);
  T* values = tile.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, t, 1 + (int64_t{1} << 15) / (n + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      draw_and_keep(values + row * ld, rule, first + static_cast<uint64_t>(row * n), n);
    }
  });
}

void drop_rescale_(Tensor tile, int64_t key_low, int64_t key_high, int64_t first, int64_t limit, double gain) {
  check_drop_rescale(tile, limit);
  const PhiloxKey key{static_cast<uint64_t>(key_low), static_cast<uint64_t>(key_high)};
  const Rule rule{0.0, 0.0, key, static_cast<uint64_t>(limit), gain, 1.0};
  const uint64_t entry = static_cast<uint64_t>(first) * static_cast<uint64_t>(tile.size(1));
  Tensor rows = unit_stride(tile);
  if (tile.scalar_type() == ScalarType::Float) {
    drop_rows<float>(rows, rule, entry);
  } else {
    drop_rows<double>(rows, rule, entry);
  }
  if (rows.get() != tile.get() && rows.const_data_ptr() != tile.const_data_ptr()) {
    torch::stable::copy_(tile, rows);
  }
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(loraforge, CPU, m) {
  m.impl("entry_merge", TORCH_BOX(&entry_merge));
  m.impl("drop_rescale_", TORCH_BOX(&drop_rescale_));
}

} // namespace loraforge
