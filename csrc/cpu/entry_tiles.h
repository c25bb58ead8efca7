// Tiles of adapters' entries: formed from their factors, or taken from rows that are there, in the cache.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "../common/cast.h"
#include "../common/operands.h"
#include "../common/isa.h"
#include "../common/layout.h"

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

// Where a tile lies: rows x width entries from (row, at) of a matrix of n columns, its own rows `strip` apart.
struct Place {
  int64_t row, rows, at, width, strip, n;
};

// One adapter's entries: B (t, r) and A (r, n) in double, or rows of any float type times a factor.
struct Source {
  Tensor left;
  Tensor right;
  bool dense;
  double scaling;
  int64_t r;
};

Source source_of(const Tensor& left, const Tensor* right, double scaling) {
  if (!right) {
    return {unit_stride(left), unit_stride(left), true, scaling, 0};
  }
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

} // namespace
} // namespace loraforge
