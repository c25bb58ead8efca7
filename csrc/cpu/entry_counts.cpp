// Digits of magnitudes, counted over the entries of one adapter: what a threshold is found from.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <mutex>
#include <vector>

#include "entry_tiles.h"

namespace loraforge {
namespace {

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
  check_entry_counts(counts, left, right ? &*right : nullptr, dtype, wide, prefixes.size(), low, high);
  const std::vector<Source> source{source_of(left, right ? &*right : nullptr, scaling)};
  const Digit digit{prefixes, low, high};
  int64_t* table = counts.mutable_data_ptr<int64_t>();
  const size_t size = static_cast<size_t>(counts.numel());
  if (dtype == ScalarType::Float) {
    wide ? count_entries<uint64_t, float>(source, digit, table, size)
         : count_entries<uint32_t, float>(source, digit, table, size);
  } else {
    wide ? count_entries<uint64_t, double>(source, digit, table, size)
         : count_entries<uint32_t, double>(source, digit, table, size);
  }
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(loraforge, CPU, m) {
  m.impl("entry_counts_", TORCH_BOX(&entry_counts_));
}

} // namespace loraforge
