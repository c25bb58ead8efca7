// Entry-wise rules: entries are formed in registers, a rule is applied and the adapters are joined or counted there.
//
// A product sums over r in order by fused multiply-adds in double, as the CPU operator does, so bits are the same on
// both. Bound by these: m n R multiply-adds of 8 bytes against 4 m n bytes written.
#include "entrywise.h"

#include "device.cuh"

namespace loraforge::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;  // rows and columns of a block's tile
constexpr int kRows = 2;   // rows of a thread, a warp apart
constexpr int kWide = 8;   // neighbouring columns of a thread: the draws of one Philox block where rows are aligned
constexpr int kDepth = 16; // of r that shared memory holds at a time

__device__ __forceinline__ float multiply_add(float a, float b, float c) {
  return fmaf(a, b, c);
}
__device__ __forceinline__ double multiply_add(double a, double b, double c) {
  return fma(a, b, c);
}

// A product that is rounded before it is used: the compiler must not fuse it with a sum.
__device__ __forceinline__ float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
__device__ __forceinline__ double rounded_product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

struct Factors {
  double left[kTile][kDepth + 1];
  alignas(16) double right[kDepth][kTile];
};

// Where a thread's entries are: rows row, row + 32 and columns column .. column + 7.
struct Place {
  int64_t row, column;
};

__device__ __forceinline__ Place place_of(int64_t tile_row, int64_t tile_column) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  return {tile_row * kTile + lane, tile_column * kTile + warp * kWide};
}

// Entries of a tile from the factors; every thread of the block takes part.
template <typename T>
__device__ __forceinline__ void form(
    const EntrySource& source, int64_t tile_row, int64_t tile_column, int64_t t, int64_t n, Factors& shared,
    T (&x)[kRows][kWide]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const double* left = static_cast<const double*>(source.left);
  double sums[kRows][kWide] = {};
  for (int64_t from = 0; from < source.r; from += kDepth) {
    const int depth = source.r - from < kDepth ? static_cast<int>(source.r - from) : kDepth;
    __syncthreads(); // the last turn's factors have been used
#pragma unroll
    for (int turn = 0; turn < kTile * kDepth / kThreads; ++turn) {
      const int at = turn * kThreads + static_cast<int>(threadIdx.x);
      const int64_t row = tile_row * kTile + at / kDepth, column = tile_column * kTile + at % kTile;
      const int in_left = at % kDepth, in_right = at / kTile;
      const bool has_left = row < t && in_left < depth, has_right = column < n && in_right < depth;
      shared.left[at / kDepth][in_left] = has_left ? left[row * source.ld_left + from + in_left] : 0.0;
      shared.right[in_right][at % kTile] =
          has_right ? source.right[(from + in_right) * source.ld_right + column] : 0.0;
    }
    __syncthreads();
    for (int k = 0; k < depth; ++k) {
      double b[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        b[i] = shared.left[lane + i * kWarp][k];
      }
#pragma unroll
      for (int half = 0; half < kWide; half += 4) {
        const Four<double> a = *reinterpret_cast<const Four<double>*>(&shared.right[k][warp * kWide + half]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            sums[i][half + j] = fma(b[i], a.at[j], sums[i][half + j]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      x[i][j] = static_cast<T>(sums[i][j]);
    }
  }
}

// Entries of a tile from rows that are there already; zeros beyond.
template <typename T>
__device__ __forceinline__ void load(
    const EntrySource& source, Place place, int64_t t, int64_t n, T (&x)[kRows][kWide]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      const int64_t row = place.row + i * kWarp, column = place.column + j;
      const int64_t at = row * source.ld_left + column;
      double value = 0.0;
      if (row < t && column < n) {
        if (source.kind == Float::f32) {
          value = as_double(static_cast<const float*>(source.left)[at]);
        } else if (source.kind == Float::f64) {
          value = static_cast<const double*>(source.left)[at];
        } else if (source.kind == Float::bf16) {
          value = as_double(static_cast<const Bf16*>(source.left)[at]);
        } else {
          value = as_double(static_cast<const F16*>(source.left)[at]);
        }
      }
      x[i][j] = static_cast<T>(rounded_product(value, source.scaling));
    }
  }
}

template <typename T, bool kDense>
__device__ __forceinline__ void entries(
    const EntrySource& source, int64_t tile_row, int64_t tile_column, int64_t t, int64_t n, Factors& shared,
    T (&x)[kRows][kWide]) {
  if constexpr (kDense) {
    load(source, place_of(tile_row, tile_column), t, n, x);
  } else {
    form(source, tile_row, tile_column, t, n, shared, x);
  }
}

// Multiplies eight neighbouring entries from number `entry` on by gain where their draw is below the limit, else by 0.
template <typename T>
__device__ __forceinline__ void draw_and_keep(T (&x)[kWide], uint64_t entry, PhiloxKey key, uint64_t limit, T gain) {
  const int skip = static_cast<int>(entry % kDrawsPerBlock);
  uint32_t draws[kDrawsPerBlock];
  philox_block(key, entry / kDrawsPerBlock, draws);
  unsigned kept = 0;
#pragma unroll
  for (int j = 0; j < kDrawsPerBlock; ++j) {
    kept |= (draws[j] < limit ? 1u : 0u) << j;
  }
  if (skip != 0) {
    philox_block(key, entry / kDrawsPerBlock + 1, draws);
#pragma unroll
    for (int j = 0; j < kDrawsPerBlock; ++j) {
      kept |= (draws[j] < limit ? 1u : 0u) << (j + kDrawsPerBlock);
    }
  }
  kept >>= skip;
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    x[j] = rounded_product(x[j], (kept >> j & 1u) != 0 ? gain : T(0));
  }
}

// A NaN compares as neither smaller nor larger and stays; infinity minus itself is NaN, which is seen.
template <typename T>
__device__ __forceinline__ T bounded(T x, T low, T high) {
  const T size = x < T(0) ? -x : x;
  const T kept = size < low ? T(0) : x;
  return size > high ? kept - x : kept;
}

struct Sources {
  EntrySource at[kEntrySources];
};

template <typename T>
struct Totals {
  T* out;   // sum of the entries so far, in the end the result
  T* sizes; // of their magnitudes; null where one launch does all
  int* votes;
};

// Votes: how many entries are not 0 in the low half, and above it the sum of their signs.
__device__ __forceinline__ int voters_of(int votes) {
  return votes & 0xFFFF;
}
__device__ __forceinline__ int signs_of(int votes) {
  return (votes - voters_of(votes)) / 0x10000;
}

template <typename T>
__device__ __forceinline__ T elected(T total, T sizes, int votes) {
  const int sign = total > T(0) ? 1 : total < T(0) ? -1 : 0;
  const T agreed = sign == 0 ? total : sign > 0 ? total + sizes : total - sizes;
  const int agreeing = voters_of(votes) + sign * signs_of(votes);
  return agreed / static_cast<T>(agreeing > 1 ? agreeing : 1);
}

template <typename T, bool kDense, bool kElect>
__global__ void __launch_bounds__(kThreads, 1) merge_kernel(
    const Sources sources, int count, EntryRule rule, int64_t t, int64_t n, int64_t tile_columns, Totals<T> totals,
    bool begins, bool ends) {
  __shared__ Factors shared;
  const int64_t tile_row = blockIdx.x / tile_columns, tile_column = blockIdx.x % tile_columns;
  const Place place = place_of(tile_row, tile_column);
  T total[kRows][kWide] = {}, sizes[kRows][kWide] = {};
  int votes[kRows][kWide] = {};
  if (!begins) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        const int64_t row = place.row + i * kWarp, column = place.column + j;
        if (row < t && column < n) {
          total[i][j] = totals.out[row * n + column];
          if constexpr (kElect) {
            sizes[i][j] = totals.sizes[row * n + column];
            votes[i][j] = totals.votes[row * n + column];
          }
        }
      }
    }
  }
  for (int s = 0; s < count; ++s) {
    const EntrySource& source = sources.at[s];
    const T low = static_cast<T>(source.low), high = static_cast<T>(source.high), weight = static_cast<T>(source.weight);
    T x[kRows][kWide];
    entries<T, kDense>(source, tile_row, tile_column, t, n, shared, x);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        x[i][j] = bounded(x[i][j], low, high);
      }
      if (rule.limit <= 0xFFFFFFFFu) {
        const uint64_t entry = rule.first + static_cast<uint64_t>((place.row + i * kWarp) * n + place.column);
        draw_and_keep(x[i], entry, source.key, rule.limit, static_cast<T>(rule.gain));
      }
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        if constexpr (kElect) {
          const T value = rounded_product(x[i][j], weight);
          total[i][j] += value;
          sizes[i][j] += value < T(0) ? -value : value;
          votes[i][j] += value > T(0) ? 0x10001 : value < T(0) ? 1 - 0x10000 : 0;
        } else {
          total[i][j] = multiply_add(weight, x[i][j], total[i][j]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      const int64_t row = place.row + i * kWarp, column = place.column + j;
      if (row < t && column < n) {
        const int64_t at = row * n + column;
        if (kElect && !ends) {
          totals.sizes[at] = sizes[i][j];
          totals.votes[at] = votes[i][j];
        }
        totals.out[at] = kElect && ends ? elected(total[i][j], sizes[i][j], votes[i][j]) : total[i][j];
      }
    }
  }
}

constexpr int kPrefixes = 8; // of one launch
constexpr int kWindow = 4096; // values of the top digit that a block counts in shared memory

struct Digit {
  uint64_t prefix[kPrefixes];
  int count, low, high;
  bool top; // nothing is above: every entry agrees
};

template <typename C>
__device__ __forceinline__ uint64_t bits_of(C x) {
  if constexpr (sizeof(C) == 4) {
    return __float_as_uint(x) & 0x7FFFFFFFu;
  } else {
    return static_cast<uint64_t>(__double_as_longlong(x)) & 0x7FFFFFFFFFFFFFFFu;
  }
}

using Counter = unsigned long long;

// Zeros are many in sparse updates and would all meet in one counter: each thread counts its own.
template <typename T, typename C, bool kDense>
__global__ void __launch_bounds__(kThreads, 1) counts_kernel(
    const EntrySource source, const Digit digit, int64_t t, int64_t n, int64_t tile_columns, int64_t tiles,
    Counter* counts) {
  __shared__ Factors shared;
  __shared__ unsigned window[kWindow];
  __shared__ unsigned largest;
  __shared__ int64_t scratch[kWarp];
  const int64_t size = int64_t{1} << (digit.high - digit.low);
  int64_t zeros = 0;
  unsigned base = 0;
  bool first = true;
  for (int at = static_cast<int>(threadIdx.x); at < kWindow; at += kThreads) {
    window[at] = 0u;
  }
  if (threadIdx.x == 0) {
    largest = 0u;
  }
  __syncthreads();
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t tile_row = tile / tile_columns, tile_column = tile % tile_columns;
    const Place place = place_of(tile_row, tile_column);
    T x[kRows][kWide];
    entries<T, kDense>(source, tile_row, tile_column, t, n, shared, x);
    if (first && digit.top) { // the window lies below the largest digit of the first tile
      unsigned own = 0u;
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kWide; ++j) {
          const auto found = static_cast<unsigned>(bits_of(static_cast<C>(x[i][j])) >> digit.low);
          own = found > own ? found : own;
        }
      }
      atomicMax(&largest, own);
      __syncthreads();
      base = largest + 512u > kWindow ? largest + 512u - kWindow : 0u;
      first = false;
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        if (place.row + i * kWarp >= t || place.column + j >= n) {
          continue;
        }
        const uint64_t bits = bits_of(static_cast<C>(x[i][j]));
        if (digit.top) {
          const auto value = static_cast<unsigned>(bits >> digit.low);
          if (value == 0u) {
            ++zeros;
          } else if (value - base < static_cast<unsigned>(kWindow)) {
            atomicAdd(&window[value - base], 1u);
          } else {
            atomicAdd(&counts[value], Counter{1});
          }
          continue;
        }
        const uint64_t prefix = bits >> digit.high;
#pragma unroll
        for (int p = 0; p < kPrefixes; ++p) {
          if (p < digit.count && prefix == digit.prefix[p]) {
            atomicAdd(&counts[p * size + static_cast<int64_t>(bits >> digit.low & static_cast<uint64_t>(size - 1))],
                      Counter{1});
          }
        }
      }
    }
  }
  __syncthreads();
  if (digit.top) {
    for (int at = static_cast<int>(threadIdx.x); at < kWindow; at += kThreads) {
      if (window[at] != 0u) {
        atomicAdd(&counts[base + static_cast<unsigned>(at)], static_cast<Counter>(window[at]));
      }
    }
    zeros = block_sum(zeros, scratch);
    if (threadIdx.x == 0 && zeros != 0) {
      atomicAdd(&counts[0], static_cast<Counter>(zeros));
    }
  }
}

// One Philox block a thread.
template <typename T>
__global__ void __launch_bounds__(kThreads) drop_kernel(
    T* tile, int64_t ld, int64_t t, int64_t n, PhiloxKey key, EntryRule rule) {
  const uint64_t block = rule.first / kDrawsPerBlock + uint64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t begin = static_cast<int64_t>(block * kDrawsPerBlock - rule.first); // of the tile; may be before it
  if (begin >= t * n) {
    return;
  }
  uint32_t draws[kDrawsPerBlock];
  philox_block(key, block, draws);
  const T gain = static_cast<T>(rule.gain);
  const int64_t from = begin < 0 ? 0 : begin;
  int64_t row = from / n, column = from % n;
#pragma unroll
  for (int j = 0; j < kDrawsPerBlock; ++j) {
    if (begin + j >= 0 && begin + j < t * n) {
      T& x = tile[row * ld + column];
      x = rounded_product(x, draws[j] < rule.limit ? gain : T(0));
      column = column + 1 == n ? 0 : column + 1;
      row += column == 0 ? 1 : 0;
    }
  }
}

template <typename T>
int merge(
    const EntrySource* sources, int count, EntryRule rule, int64_t t, int64_t n, void* out, void* sizes, int* votes,
    cudaStream_t stream) {
  const bool dense = sources[0].right == nullptr;
  const auto kernel = rule.elect ? (dense ? merge_kernel<T, true, true> : merge_kernel<T, false, true>)
                                 : (dense ? merge_kernel<T, true, false> : merge_kernel<T, false, false>);
  const int64_t tile_columns = (n + kTile - 1) / kTile, tiles = (t + kTile - 1) / kTile * tile_columns;
  for (int from = 0; from < count; from += kEntrySources) {
    Sources some{};
    const int taken = count - from < kEntrySources ? count - from : kEntrySources;
    for (int s = 0; s < taken; ++s) {
      some.at[s] = sources[from + s];
    }
    LF_LAUNCH(
        kernel, static_cast<unsigned>(tiles), kThreads, 0, stream, some, taken, rule, t, n, tile_columns,
        Totals<T>{static_cast<T*>(out), static_cast<T*>(sizes), votes}, from == 0, from + taken == count);
  }
  return launched();
}

template <typename T, typename C>
int counts_of(
    EntrySource source, const int64_t* prefixes, int prefix_count, int low, int high, int64_t t,
    int64_t n, int64_t* counts, cudaStream_t stream) {
  constexpr int64_t kBlocks = 1024;
  const auto kernel = source.right == nullptr ? counts_kernel<T, C, true> : counts_kernel<T, C, false>;
  const int64_t tile_columns = (n + kTile - 1) / kTile, tiles = (t + kTile - 1) / kTile * tile_columns;
  const bool top = high == 8 * static_cast<int>(sizeof(C)) - 1;
  const int64_t size = int64_t{1} << (high - low);
  // Of the top digit every prefix has the same counts.
  for (int from = 0; from < prefix_count; from += top ? 1 : kPrefixes) {
    Digit digit{{}, 0, low, high, top};
    for (int p = from; p < prefix_count && digit.count < (top ? 1 : kPrefixes); ++p) {
      digit.prefix[digit.count++] = static_cast<uint64_t>(prefixes[p]);
    }
    LF_LAUNCH(
        kernel, static_cast<unsigned>(tiles < kBlocks ? tiles : kBlocks), kThreads, 0, stream, source, digit, t, n,
        tile_columns, tiles, reinterpret_cast<Counter*>(counts + from * size));
  }
  return launched();
}

template <typename T>
int drop(void* tile, int64_t ld, int64_t t, int64_t n, PhiloxKey key, EntryRule rule, cudaStream_t stream) {
  const int64_t blocks = (static_cast<int64_t>(rule.first % kDrawsPerBlock) + t * n + kDrawsPerBlock - 1) / kDrawsPerBlock;
  LF_LAUNCH(
      drop_kernel<T>, static_cast<unsigned>((blocks + kThreads - 1) / kThreads), kThreads, 0, stream,
      static_cast<T*>(tile), ld, t, n, key, rule);
  return launched();
}

} // namespace

int entry_merge(
    Float out_kind, const EntrySource* sources, int count, EntryRule rule, int64_t t, int64_t n, void* out, void* sizes,
    int* votes, cudaStream_t stream) {
  if (t == 0 || n == 0) {
    return 0;
  }
  return out_kind == Float::f32 ? merge<float>(sources, count, rule, t, n, out, sizes, votes, stream)
                                : merge<double>(sources, count, rule, t, n, out, sizes, votes, stream);
}

int entry_counts(
    Float entry_kind, bool wide, EntrySource source, const int64_t* prefixes, int prefix_count, int low, int high,
    int64_t t, int64_t n, int64_t* counts, cudaStream_t stream) {
  if (t == 0 || n == 0) {
    return 0;
  }
  const auto run = entry_kind == Float::f32 ? (wide ? counts_of<float, double> : counts_of<float, float>)
                                            : (wide ? counts_of<double, double> : counts_of<double, float>);
  return run(source, prefixes, prefix_count, low, high, t, n, counts, stream);
}

int drop_rescale(
    Float kind, void* tile, int64_t ld, int64_t t, int64_t n, PhiloxKey key, EntryRule rule, cudaStream_t stream) {
  if (t == 0 || n == 0) {
    return 0;
  }
  return kind == Float::f32 ? drop<float>(tile, ld, t, n, key, rule, stream)
                            : drop<double>(tile, ld, t, n, key, rule, stream);
}

} // namespace loraforge::cuda
