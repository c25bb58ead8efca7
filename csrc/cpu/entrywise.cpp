// Entry-wise rules on the deltas of all adapters: entries are formed, counted, dropped and joined in the cache.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <mutex>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include "../common/cast.h"
#include "../common/checks.h"
#include "../common/isa.h"
#include "../common/layout.h"
#include "../common/philox.h"

namespace loraforge {
namespace {

// Entries are worked on in tiles that stay in the first two caches: products in strips of kStrip columns, so that a
// source's strip of A does too, rows that are there already in long pieces. An entry's arithmetic does not depend on
// where it lies in them.
constexpr int64_t kStrip = 128;
constexpr int64_t kRows = 16;
constexpr int64_t kTile = kRows * kStrip;

template <typename T>
struct Lanes {
  static constexpr int64_t kCount = 64 / static_cast<int64_t>(sizeof(T));
  using Whole = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  typedef T Vector __attribute__((vector_size(64)));
  typedef Whole Mask __attribute__((vector_size(64)));
};

// rows (kTall, kStrip) of B A: sums over r in order, in double, rounded once. panel: (r, kStrip).
template <int kTall, typename T>
LF_BODY void form_rows(const double* left, int64_t ld, int64_t r, const double* panel, T* to) {
  constexpr int64_t kWide = 2;
  for (int64_t at = 0; at < kStrip; at += kWide * kLanes) {
    DoubleLanes sums[kTall][kWide] = {};
    for (int64_t k = 0; k < r; ++k) {
      DoubleLanes a[kWide];
#pragma GCC unroll 2
      for (int64_t w = 0; w < kWide; ++w) {
        load_lanes(panel + k * kStrip + at + w * kLanes, a[w]);
      }
#pragma GCC unroll 4
      for (int64_t row = 0; row < kTall; ++row) {
        const double b = left[row * ld + k];
#pragma GCC unroll 2
        for (int64_t w = 0; w < kWide; ++w) {
          sums[row][w] += b * a[w];
        }
      }
    }
#pragma GCC unroll 4
    for (int64_t row = 0; row < kTall; ++row) {
#pragma GCC unroll 2
      for (int64_t w = 0; w < kWide; ++w) {
        store_lanes(sums[row][w], to + row * kStrip + at + w * kLanes);
      }
    }
  }
}

template <typename T>
LF_BODY void form_body(const double* left, int64_t ld, int64_t r, const double* panel, int64_t rows, T* to) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    form_rows<4>(left + row * ld, ld, r, panel, to + row * kStrip);
  }
  for (; row < rows; ++row) {
    form_rows<1>(left + row * ld, ld, r, panel, to + row * kStrip);
  }
}

LF_CLONES void form(const double* left, int64_t ld, int64_t r, const double* panel, int64_t rows, float* to) {
  form_body(left, ld, r, panel, rows, to);
}
LF_CLONES void form(const double* left, int64_t ld, int64_t r, const double* panel, int64_t rows, double* to) {
  form_body(left, ld, r, panel, rows, to);
}

// What a rule does to the entries of one adapter.
struct Rule {
  double low;      // smaller magnitudes become 0
  double high;     // larger magnitudes become 0
  PhiloxKey key;   // of the draws
  uint64_t limit;  // an entry is kept where its draw is below; 2^32 keeps all and draws nothing
  double gain;     // of what a draw keeps
  double weight;   // of what is left
};

constexpr uint64_t kAll = uint64_t{1} << 32;

// A NaN compares as neither smaller nor larger and stays; one that a draw drops stays too, as 0 times it is NaN.
template <typename T>
LF_BODY void bound_body(T* x, int64_t n, T low, T high) {
  using V = typename Lanes<T>::Vector;
  using M = typename Lanes<T>::Mask;
  for (int64_t at = 0; at < n; at += Lanes<T>::kCount) {
    V value;
    std::memcpy(&value, x + at, sizeof(value));
    const V size = value < T(0) ? -value : value;
    const M keep = ~(M)(size < low);
    V kept = (V)((M)value & keep);
    kept -= size > high ? value : V{}; // infinity minus itself is NaN, which is seen
    std::memcpy(x + at, &kept, sizeof(kept));
  }
}

LF_CLONES void bound(float* x, int64_t n, float low, float high) {
  bound_body(x, n, low, high);
}
LF_CLONES void bound(double* x, int64_t n, double low, double high) {
  bound_body(x, n, low, high);
}

#if defined(__x86_64__) && defined(__GNUC__)
#define LF_WIDE_DRAWS 1
#define LF_AVX512 __attribute__((target("avx512f")))

typedef uint64_t Eight __attribute__((vector_size(64)));

// Low halves of eight numbers, multiplied.
LF_AVX512 inline Eight multiply_low(Eight a, Eight b) {
  return (Eight)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, (__m512i)b);
}

// Both halves of eight 128-bit products with a constant.
LF_AVX512 inline void multiply_eight(Eight x, uint64_t by, Eight& high, Eight& low) {
  const Eight x_high = x >> 32, by_low = Eight{} + (by & 0xFFFFFFFFu), by_high = Eight{} + (by >> 32);
  const Eight bottom = multiply_low(x, by_low);
  const Eight inner = multiply_low(x, by_high) + (bottom >> 32);
  const Eight outer = multiply_low(x_high, by_low) + (inner & 0xFFFFFFFFu);
  high = multiply_low(x_high, by_high) + (inner >> 32) + (outer >> 32);
  low = (outer << 32) | (bottom & 0xFFFFFFFFu);
}

// philox_block of eight blocks from `block` on.
LF_AVX512 void draw_eight(PhiloxKey key, uint64_t block, uint32_t* draws) {
  Eight high0, low0, high1, low1;
  multiply_eight(Eight{1, 2, 3, 4, 5, 6, 7, 8} + block, kPhiloxMultiply0, high0, low0);
  // In round 0 three words are 0, in round 1 the first is the key: products of these are known.
  uint64_t known_high, known_low;
  multiply(kPhiloxMultiply0, key.low, known_high, known_low);
  multiply_eight(high0 ^ key.high, kPhiloxMultiply1, high1, low1);
  key.low += kPhiloxStep0;
  key.high += kPhiloxStep1;
  Eight x0 = high1 ^ key.low, x1 = low1, x2 = low0 ^ (known_high ^ key.high), x3 = Eight{} + known_low;
#pragma GCC unroll 8
  for (int round = 2; round < kPhiloxRounds; ++round) {
    key.low += kPhiloxStep0;
    key.high += kPhiloxStep1;
    multiply_eight(x0, kPhiloxMultiply0, high0, low0);
    multiply_eight(x2, kPhiloxMultiply1, high1, low1);
    x0 = high1 ^ x1 ^ key.low;
    x1 = low1;
    x2 = high0 ^ x3 ^ key.high;
    x3 = low0;
  }
  // Word w of block b goes to place 4 b + w.
  const Eight even01 = __builtin_shufflevector(x0, x1, 0, 8, 2, 10, 4, 12, 6, 14);
  const Eight odd01 = __builtin_shufflevector(x0, x1, 1, 9, 3, 11, 5, 13, 7, 15);
  const Eight even23 = __builtin_shufflevector(x2, x3, 0, 8, 2, 10, 4, 12, 6, 14);
  const Eight odd23 = __builtin_shufflevector(x2, x3, 1, 9, 3, 11, 5, 13, 7, 15);
  const Eight even_first = __builtin_shufflevector(even01, even23, 0, 1, 8, 9, 2, 3, 10, 11);
  const Eight even_last = __builtin_shufflevector(even01, even23, 4, 5, 12, 13, 6, 7, 14, 15);
  const Eight odd_first = __builtin_shufflevector(odd01, odd23, 0, 1, 8, 9, 2, 3, 10, 11);
  const Eight odd_last = __builtin_shufflevector(odd01, odd23, 4, 5, 12, 13, 6, 7, 14, 15);
  const Eight turned[4] = {
      __builtin_shufflevector(even_first, odd_first, 0, 1, 2, 3, 8, 9, 10, 11),
      __builtin_shufflevector(even_first, odd_first, 4, 5, 6, 7, 12, 13, 14, 15),
      __builtin_shufflevector(even_last, odd_last, 0, 1, 2, 3, 8, 9, 10, 11),
      __builtin_shufflevector(even_last, odd_last, 4, 5, 6, 7, 12, 13, 14, 15)};
  std::memcpy(draws, turned, sizeof(turned));
}

bool draws_eight_at_once() {
  static const bool can = __builtin_cpu_supports("avx512f") != 0;
  return can;
}
#endif

constexpr int64_t kDrawn = 64; // draws of one turn

// Draws of entries first .. first + count, count <= kDrawn; `buffer` holds kDrawn + 8. Returns where they begin.
LF_CLONES const uint32_t* draw(PhiloxKey key, uint64_t first, int64_t count, uint32_t* buffer) {
  const uint64_t skip = first % kDrawsPerBlock, block = first / kDrawsPerBlock;
  const int64_t blocks = (static_cast<int64_t>(skip) + count + kDrawsPerBlock - 1) / kDrawsPerBlock;
  int64_t b = 0;
#ifdef LF_WIDE_DRAWS
  if (blocks >= 8 && draws_eight_at_once()) {
    draw_eight(key, block, buffer);
    b = 8;
  }
#endif
  for (; b < blocks; ++b) {
    philox_block(key, block + static_cast<uint64_t>(b), *reinterpret_cast<uint32_t(*)[kDrawsPerBlock]>(buffer + 8 * b));
  }
  return buffer + skip;
}

template <typename T>
LF_BODY void keep_body(T* x, const uint32_t* draws, int64_t n, uint32_t limit, T gain) {
  using V = typename Lanes<T>::Vector;
  using M = typename Lanes<T>::Mask;
  constexpr int64_t kWide = Lanes<T>::kCount;
  typedef uint32_t Drawn __attribute__((vector_size(4 * kWide)));
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
    V value;
    Drawn drawn;
    std::memcpy(&value, x + i, sizeof(value));
    std::memcpy(&drawn, draws + i, sizeof(drawn));
    const M kept = __builtin_convertvector(drawn < limit, M);
    value *= (V)((M)(V{} + gain) & kept);
    std::memcpy(x + i, &value, sizeof(value));
  }
  for (; i < n; ++i) {
    x[i] *= draws[i] < limit ? gain : T(0);
  }
}

LF_CLONES void keep(float* x, const uint32_t* draws, int64_t n, uint32_t limit, float gain) {
  keep_body(x, draws, n, limit, gain);
}
LF_CLONES void keep(double* x, const uint32_t* draws, int64_t n, uint32_t limit, double gain) {
  keep_body(x, draws, n, limit, gain);
}

template <typename T>
LF_BODY void scale_body(T* x, int64_t n, T factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    x[i] *= factor;
  }
}

LF_CLONES void scale(float* x, int64_t n, float factor) {
  scale_body(x, n, factor);
}
LF_CLONES void scale(double* x, int64_t n, double factor) {
  scale_body(x, n, factor);
}

// `width` entries of `x` that begin at entry `first` of their matrix.
template <typename T>
void draw_and_keep(T* x, const Rule& rule, uint64_t first, int64_t width) {
  alignas(64) uint32_t buffer[kDrawn + kDrawsPerBlock];
  for (int64_t at = 0; at < width; at += kDrawn) {
    const int64_t count = std::min(kDrawn, width - at);
    const uint32_t* draws = draw(rule.key, first + static_cast<uint64_t>(at), count, buffer);
    keep(x + at, draws, count, static_cast<uint32_t>(rule.limit), static_cast<T>(rule.gain));
  }
}

// Where a tile lies: rows x width entries from (row, at) of a matrix of n columns, its own rows `strip` apart.
struct Place {
  int64_t row, rows, at, width, strip, n;
};

// `first` is the number of the entry at (0, 0).
template <typename T>
void apply(T* x, const Rule& rule, const Place& place, uint64_t first, bool weigh) {
  const T low = static_cast<T>(rule.low), high = static_cast<T>(rule.high);
  if (low > T(0) || high < std::numeric_limits<T>::infinity()) {
    bound(x, place.rows * place.strip, low, high);
  }
  if (rule.limit < kAll) {
    for (int64_t i = 0; i < place.rows; ++i) {
      const uint64_t entry = first + static_cast<uint64_t>((place.row + i) * place.n + place.at);
      draw_and_keep(x + i * place.strip, rule, entry, place.width);
    }
  }
  if (weigh && rule.weight != 1.0) {
    scale(x, place.rows * place.strip, static_cast<T>(rule.weight));
  }
}

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

// One adapter's entries: B (t, r) and A (r, n) in double, or rows of any float type times a factor.
struct Source {
  Tensor left;
  Tensor right;
  bool dense;
  double scaling;
  int64_t r;
};

Source source_of(const char* op, const Tensor& left, const Tensor* right, double scaling) {
  check_dim(op, "left", left, 2, right ? "(t, r)" : "(t, n)");
  if (!right) {
    check_dtype(op, "left", left, {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half});
    return {unit_stride(left), unit_stride(left), true, scaling, 0};
  }
  check_dim(op, "right", *right, 2, "(r, n)");
  check_dtype(op, "left", left, {ScalarType::Double});
  check_dtype(op, "right", *right, {ScalarType::Double});
  check_size(op, "right", *right, 0, left.size(1), "r of left");
  return {unit_stride(left), unit_stride(*right), false, 1.0, left.size(1)};
}

// Columns at .. at + width of A, (r, kStrip), zeros beyond.
void pack(const Source& source, int64_t at, int64_t width, double* panel) {
  const double* a = source.right.const_data_ptr<double>() + at;
  const int64_t ld = source.right.stride(0);
  for (int64_t k = 0; k < source.r; ++k) {
    std::copy_n(a + k * ld, width, panel + k * kStrip);
    std::fill(panel + k * kStrip + width, panel + (k + 1) * kStrip, 0.0);
  }
}

template <typename From, typename To>
LF_BODY void widen_body(const From* from, int64_t n, double factor, To* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    to[i] = static_cast<To>(cast_one<From, double>(from[i]) * factor);
  }
}

LF_CLONES void widen(const float* from, int64_t n, double factor, float* to) {
  widen_body(from, n, factor, to);
}
LF_CLONES void widen(const float* from, int64_t n, double factor, double* to) {
  widen_body(from, n, factor, to);
}
LF_CLONES void widen(const double* from, int64_t n, double factor, float* to) {
  widen_body(from, n, factor, to);
}
LF_CLONES void widen(const double* from, int64_t n, double factor, double* to) {
  widen_body(from, n, factor, to);
}
LF_CLONES void widen(const BFloat16* from, int64_t n, double factor, float* to) {
  widen_body(from, n, factor, to);
}
LF_CLONES void widen(const BFloat16* from, int64_t n, double factor, double* to) {
  widen_body(from, n, factor, to);
}
template <typename To>
void widen(const Half* from, int64_t n, double factor, To* to) {
  widen_body(from, n, factor, to);
}

// A tile of one source, zeros beyond its width. panel: its strip of A.
template <typename T>
void fill(const Source& source, const double* panel, const Place& place, T* to) {
  const int64_t ld = source.left.stride(0);
  if (!source.dense) {
    form(source.left.const_data_ptr<double>() + place.row * ld, ld, source.r, panel, place.rows, to);
    return;
  }
  for_float_type(source.left.scalar_type(), [&](auto zero) {
    using From = decltype(zero);
    const From* from = static_cast<const From*>(source.left.const_data_ptr()) + place.row * ld + place.at;
    for (int64_t i = 0; i < place.rows; ++i) {
      widen(from + i * ld, place.width, source.scaling, to + i * place.strip);
      std::fill(to + i * place.strip + place.width, to + (i + 1) * place.strip, T(0));
    }
  });
}

// Calls work(panels, place) for tiles that cover t x n entries, over all threads, with one `work` from begin_range for
// each thread's share. panels: a strip of each source's A.
template <typename F>
void for_tiles(const std::vector<Source>& sources, int64_t t, int64_t n, const F& begin_range) {
  int64_t ranks = 0;
  for (const Source& source : sources) {
    ranks += source.r;
  }
  if (sources[0].dense) {
    const int64_t pieces = (n + kTile - 1) / kTile;
    torch::stable::parallel_for(0, t * pieces, 32, [&](int64_t begin, int64_t end) {
      auto work = begin_range();
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t at = piece % pieces * kTile, width = std::min(kTile, n - at);
        // Whole lanes, so that the vectors that work on a tile never look beyond it.
        work(nullptr, Place{piece / pieces, 1, at, width, (width + 15) / 16 * 16, n});
      }
      work.done();
    });
    return;
  }
  torch::stable::parallel_for(0, (n + kStrip - 1) / kStrip, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> panels(static_cast<size_t>(ranks * kStrip));
    auto work = begin_range();
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t at = strip * kStrip, width = std::min(kStrip, n - at);
      double* panel = panels.data();
      for (const Source& source : sources) {
        pack(source, at, width, panel);
        panel += source.r * kStrip;
      }
      for (int64_t row = 0; row < t; row += kRows) {
        work(panels.data(), Place{row, std::min(kRows, t - row), at, width, kStrip, n});
      }
    }
    work.done();
  });
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

void check_length(const char* op, const char* name, size_t got, size_t expected) {
  if (got != expected) {
    refuse(op, name, "length " + std::to_string(got), "length " + std::to_string(expected));
  }
}

Tensor entry_merge(
    std::vector<Tensor> left, std::vector<Tensor> right, std::vector<double> scaling, std::vector<double> weights,
    std::vector<double> low, std::vector<double> high, std::vector<int64_t> keys, int64_t limit, double gain,
    int64_t first, bool electing, ScalarType dtype) {
  constexpr const char* op = "entry_merge";
  const size_t count = left.size();
  if (count == 0) {
    refuse(op, "left", "no tensors", "one or more");
  }
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) {
    refuse(op, "the result", std::string("dtype ") + torch::headeronly::toString(dtype), "dtype Float or Double");
  }
  check_length(op, "right", right.size(), right.empty() ? 0 : count);
  check_length(op, "scaling", scaling.size(), count);
  check_length(op, "weights", weights.size(), count);
  check_length(op, "low", low.size(), count);
  check_length(op, "high", high.size(), count);
  check_length(op, "keys", keys.size(), 2 * count);
  if (limit < 0 || limit > static_cast<int64_t>(kAll)) {
    refuse(op, "limit", "value " + std::to_string(limit), "0 to 2^32");
  }
  std::vector<Source> sources;
  std::vector<Rule> rules;
  for (size_t i = 0; i < count; ++i) {
    sources.push_back(source_of(op, left[i], right.empty() ? nullptr : &right[i], scaling[i]));
    check_size(op, "left", left[i], 0, left[0].size(0), "rows of the first");
    check_size(
        op, right.empty() ? "left" : "right", sources[i].right, 1, sources[0].right.size(1), "columns of the first");
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

// A digit of the magnitudes' bits: those of `high` and above must equal a prefix, the count is by those from `low` to it.
struct Digit {
  std::vector<int64_t> prefixes;
  int64_t low;
  int64_t high;
};

// Bits of the magnitudes from `low` on; returns how many of them agree with one of a run of prefixes.
template <typename T, typename Bits>
LF_BODY int64_t digits_body(const T* x, int64_t n, int64_t low, int64_t high, uint64_t prefix, uint64_t run, Bits* digits) {
  using Compared = std::conditional_t<sizeof(Bits) == 4, float, double>;
  Bits equal = 0;
  const Bits wanted = static_cast<Bits>(prefix), taken = static_cast<Bits>(run), mask = ~(Bits{1} << (8 * sizeof(Bits) - 1));
  const int gap = static_cast<int>(high - low), down = static_cast<int>(low);
#pragma omp simd reduction(+ : equal)
  for (int64_t i = 0; i < n; ++i) {
    const Compared value = static_cast<Compared>(x[i]);
    Bits bits;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    bits = (bits & mask) >> down;
    digits[i] = bits;
    const Bits place = (bits >> gap) - wanted; // wraps far up where it is below
    equal += static_cast<Bits>(place < taken);
  }
  return static_cast<int64_t>(equal);
}

LF_CLONES int64_t digits_of(const float* x, int64_t n, int64_t low, int64_t high, uint64_t prefix, uint64_t run, uint32_t* digits) {
  return digits_body(x, n, low, high, prefix, run, digits);
}
LF_CLONES int64_t digits_of(const float* x, int64_t n, int64_t low, int64_t high, uint64_t prefix, uint64_t run, uint64_t* digits) {
  return digits_body(x, n, low, high, prefix, run, digits);
}
LF_CLONES int64_t digits_of(const double* x, int64_t n, int64_t low, int64_t high, uint64_t prefix, uint64_t run, uint32_t* digits) {
  return digits_body(x, n, low, high, prefix, run, digits);
}
LF_CLONES int64_t digits_of(const double* x, int64_t n, int64_t low, int64_t high, uint64_t prefix, uint64_t run, uint64_t* digits) {
  return digits_body(x, n, low, high, prefix, run, digits);
}

// Counts a tile's digits, in a table of its own where threads share the work: whole numbers add up in any order.
template <typename Bits, typename T>
class Count {
 public:
  Count(const Source& source, const Digit& digit, int64_t* counts, size_t size, std::mutex* adding)
      : source_(source), digit_(digit), counts_(counts), adding_(adding), tile_(kTile) {
    if (adding_) {
      own_.assign(size, 0);
    }
  }

  void operator()(const double* panel, const Place& place) {
    fill(source_, panel, place, tile_.data());
    for (int64_t i = 0; i < place.rows; ++i) {
      for (int64_t at = 0; at < place.width; at += kStrip) {
        count(tile_.data() + i * place.strip + at, std::min(kStrip, place.width - at));
      }
    }
  }

  void done() {
    if (adding_) {
      const std::lock_guard<std::mutex> lock(*adding_);
      std::transform(own_.begin(), own_.end(), counts_, counts_, [](int64_t a, int64_t b) { return a + b; });
    }
  }

 private:
  void count(const T* x, int64_t n) {
    alignas(64) Bits digits[kStrip];
    const int gap = static_cast<int>(digit_.high - digit_.low);
    const bool top = digit_.high == 8 * static_cast<int64_t>(sizeof(Bits)) - 1; // nothing is above: all agree
    const Bits mask = (Bits{1} << gap) - 1;
    int64_t* table = adding_ ? own_.data() : counts_;
    const int64_t size = int64_t{1} << gap;
    for (size_t p = 0; p < digit_.prefixes.size();) {
      // Neighbouring prefixes, as a search near a guess has them, are looked for together.
      const Bits wanted = static_cast<Bits>(digit_.prefixes[p]);
      const bool pair = !top && p + 1 < digit_.prefixes.size() && digit_.prefixes[p + 1] == digit_.prefixes[p] + 1;
      const uint64_t run = pair ? 2 : 1;
      if (digits_of(x, n, digit_.low, digit_.high, static_cast<uint64_t>(wanted), run, digits) != 0) {
        for (int64_t i = 0; i < n; ++i) {
          const Bits place = top ? 0 : (digits[i] >> gap) - wanted;
          if (place < run) {
            ++table[static_cast<int64_t>(place) * size + static_cast<int64_t>(digits[i] & mask)];
          }
        }
      }
      table += static_cast<int64_t>(run) * size;
      p += run;
    }
  }

  const Source& source_;
  const Digit& digit_;
  int64_t* counts_;
  std::mutex* adding_;
  std::vector<T> tile_;
  std::vector<int64_t> own_;
};

template <typename Bits, typename T>
void count_entries(const std::vector<Source>& sources, const Digit& digit, int64_t* counts, size_t size) {
  const int64_t t = sources[0].left.size(0), n = sources[0].right.size(1);
  std::mutex adding;
  for_tiles(sources, t, n, [&] {
    return Count<Bits, T>(sources[0], digit, counts, size, torch::stable::get_num_threads() > 1 ? &adding : nullptr);
  });
}

void entry_counts_(
    Tensor counts, const Tensor& left, std::optional<Tensor> right, double scaling, ScalarType dtype, bool wide,
    std::vector<int64_t> prefixes, int64_t low, int64_t high) {
  constexpr const char* op = "entry_counts_";
  check_dim(op, "counts", counts, 2, "(prefixes, 2^(high - low))");
  check_dtype(op, "counts", counts, {ScalarType::Long});
  if (low < 0 || high <= low || high > (wide ? 63 : 31) || high - low > 20) {
    refuse(
        op, "the digit", "bits " + std::to_string(low) + " to " + std::to_string(high),
        std::string("at most 20 of ") + (wide ? "63" : "31") + " bits");
  }
  check_size(op, "counts", counts, 0, static_cast<int64_t>(prefixes.size()), "number of prefixes");
  check_size(op, "counts", counts, 1, int64_t{1} << (high - low), "values of a digit");
  if (!counts.is_contiguous()) {
    refuse(op, "counts", "rows that lie apart", "a contiguous tensor");
  }
  const std::vector<Source> source{source_of(op, left, right ? &*right : nullptr, scaling)};
  const Digit digit{prefixes, low, high};
  int64_t* table = counts.mutable_data_ptr<int64_t>();
  const size_t size = static_cast<size_t>(counts.numel());
  if (dtype == ScalarType::Float) {
    wide ? count_entries<uint64_t, float>(source, digit, table, size)
         : count_entries<uint32_t, float>(source, digit, table, size);
  } else if (dtype == ScalarType::Double) {
    wide ? count_entries<uint64_t, double>(source, digit, table, size)
         : count_entries<uint32_t, double>(source, digit, table, size);
  } else {
    refuse(op, "an entry", std::string("dtype ") + torch::headeronly::toString(dtype), "dtype Float or Double");
  }
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
  constexpr const char* op = "drop_rescale_";
  check_dim(op, "tile", tile, 2, "(t, n)");
  check_dtype(op, "tile", tile, {ScalarType::Float, ScalarType::Double});
  if (limit < 0 || limit >= static_cast<int64_t>(kAll)) {
    refuse(op, "limit", "value " + std::to_string(limit), "0 to 2^32 - 1");
  }
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
  m.impl("entry_counts_", TORCH_BOX(&entry_counts_));
  m.impl("drop_rescale_", TORCH_BOX(&drop_rescale_));
}

} // namespace loraforge
