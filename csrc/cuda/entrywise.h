// Entry-wise rules on the device. Formulas and shapes: loraforge/kernels/entrywise.py and entry_counts.py.
#pragma once

#include "../common/philox.h"
#include "launch.h"

namespace loraforge::cuda {

// One adapter: B (t, r) and A (r, n) in double, or with right null rows (t, n) of any float type, times `scaling`.
struct EntrySource {
  const void* left;
  const double* right;
  int64_t ld_left, ld_right, r;
  Float kind; // of rows
  double scaling, weight, low, high;
  PhiloxKey key;
};

// What all adapters share.
struct EntryRule {
  uint64_t limit; // an entry is kept where its draw is below; 2^32 keeps all and draws nothing
  double gain;
  uint64_t first; // number of the first entry of the first row
  bool elect;
};

// More adapters than this take several launches, and an election then needs `sizes` (t, n) of the result's type and
// `votes` (t, n) in between; else both may be null.
constexpr int kEntrySources = 16;

// out (t, n) in f32 or f64; the sources are all low-rank or all rows.
int entry_merge(
    Float out_kind, const EntrySource* sources, int count, EntryRule rule, int64_t t, int64_t n, void* out, void* sizes,
    int* votes, cudaStream_t stream);

// counts (prefixes, 2^(high - low)) of entries that are rounded to f32 or f64 and whose bits are read as those of a
// float, or of a double if `wide`.
int entry_counts(
    Float entry_kind, bool wide, EntrySource source, const int64_t* prefixes, int prefix_count, int low, int high,
    int64_t t, int64_t n, int64_t* counts, cudaStream_t stream);

// tile (t, n) of row stride ld, times gain where an entry's draw is below the limit, else times 0.
int drop_rescale(
    Float kind, void* tile, int64_t ld, int64_t t, int64_t n, PhiloxKey key, EntryRule rule, cudaStream_t stream);

} // namespace loraforge::cuda
