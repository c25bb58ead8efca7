// Rows for a Gram product, and its addition to a double accumulator.
//
// Bytes, with e and e' bytes an entry of x and out: pack rows d (e + e'), once each in accesses of 16 bytes on the wider
// side. Fold of c float slots, symmetric, d x d: (8 + 2 c) d^2, and 4 d^2 more with the mirror, whose tiles turn through
// shared memory. Nothing below the diagonal is read, so an accumulator that takes many chunks is mirrored once.
#include "covariance.h"

#include "device.cuh"

namespace loraforge::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBytes = 16;                             // of the mask, a thread and turn
constexpr int64_t kMaskTurn = int64_t{kThreads} * kBytes;

// A bit for every byte that is not 0.
__device__ __forceinline__ unsigned set_bytes(unsigned word) {
  return (((word & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) | word) & 0x80808080u;
}

struct alignas(16) Words {
  unsigned at[4];
};

template <bool kAligned>
__global__ void __launch_bounds__(kThreads)
    kept_kernel(const uint8_t* mask, int64_t T, int* kept, int64_t room, int64_t* count) {
  __shared__ int sums[kWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  int64_t base = 0;
  for (int64_t begin = 0; begin < T; begin += kMaskTurn) {
    const int64_t at = begin + static_cast<int64_t>(threadIdx.x) * kBytes;
    Words words = {};
    if (kAligned && at + kBytes <= T) {
      words = *reinterpret_cast<const Words*>(mask + at);
    } else {
#pragma unroll
      for (int k = 0; k < kBytes; ++k) {
        words.at[k / 4] |= at + k < T ? static_cast<unsigned>(mask[at + k]) << (8 * (k % 4)) : 0u;
      }
    }
    int mine = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      words.at[w] = set_bytes(words.at[w]);
      mine += __popc(words.at[w]);
    }
    int upto = mine;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int left = __shfl_up_sync(kFullWarp, upto, offset);
      upto += lane >= offset ? left : 0;
    }
    if (lane == kWarp - 1) {
      sums[warp] = upto;
    }
    __syncthreads();
    int64_t place = base + upto - mine;
    for (int w = 0; w < kWarps; ++w) {
      place += w < warp ? sums[w] : 0;
      base += sums[w];
    }
    __syncthreads(); // the sums are free again
#pragma unroll
    for (int k = 0; k < kBytes; ++k) {
      if (words.at[k / 4] >> (8 * (k % 4) + 7) & 1u) {
        if (place < room) {
          kept[place] = static_cast<int>(at + k);
        }
        ++place;
      }
    }
  }
  if (threadIdx.x == 0) {
    *count = base;
  }
}

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Entries {
  T at[kCount];
};

__device__ __forceinline__ double weight_of(Float type, const void* weight, int64_t row) {
  switch (type) {
    case Float::f32:
      return static_cast<const float*>(weight)[row];
    case Float::f64:
      return static_cast<const double*>(weight)[row];
    case Float::bf16:
      return as_double(static_cast<const Bf16*>(weight)[row]);
    default:
      return as_double(static_cast<const F16*>(weight)[row]);
  }
}

// Arithmetic is double where either side is, else float, and is rounded once.
template <typename From, typename To>
using Wide = std::conditional_t<std::is_same_v<From, double> || std::is_same_v<To, double>, double, float>;

template <typename From, typename To>
__device__ __forceinline__ To packed(From x, bool weighted, Wide<From, To> weight) {
  if constexpr (std::is_same_v<From, To>) {
    if (!weighted) {
      return x;
    }
  }
  Wide<From, To> wide;
  if constexpr (std::is_same_v<Wide<From, To>, double>) {
    wide = as_double(x);
  } else {
    wide = as_float(x);
  }
  return store_as<To>(weighted ? wide * weight : wide);
}

// Entries that a lane moves at once: 16 bytes on the wider side.
template <typename From, typename To>
constexpr int kAtOnce = 16 / (sizeof(From) > sizeof(To) ? sizeof(From) : sizeof(To));

// A warp a row: its number and weight are read once, and the row goes by in accesses of neighbouring lanes. `groups` of
// kAtOnce entries are aligned on both sides; the entries after them go one by one.
template <typename From, typename To>
__global__ void __launch_bounds__(kThreads) pack_kernel(
    const From* x, int64_t ld, const int* kept, const int64_t* count, Float weight_type, const void* weight,
    int64_t rows, int64_t d, int64_t groups, To* out) {
  constexpr int kEntries = kAtOnce<From, To>;
  constexpr int kTurns = 4; // loads in flight
  using Source = Entries<From, kEntries>;
  using Target = Entries<To, kEntries>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarp;
  if (row >= rows) {
    return;
  }
  To* to = out + row * d;
  if (count != nullptr && *count != rows) {
    for (int64_t column = lane; column < d; column += kWarp) {
      to[column] = round_to<To>(__uint_as_float(0x7FC00000u));
    }
    return;
  }
  const int64_t source = kept == nullptr ? row : kept[row];
  const From* from = x + source * ld;
  const bool weighted = weight != nullptr;
  const auto scale = static_cast<Wide<From, To>>(weighted ? weight_of(weight_type, weight, source) : 1.0);
  for (int64_t first = lane; first < groups; first += kTurns * kWarp) {
    Source found[kTurns] = {};
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      if (first + turn * kWarp < groups) {
        found[turn] = reinterpret_cast<const Source*>(from)[first + turn * kWarp];
      }
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      if (first + turn * kWarp < groups) {
        Target made;
#pragma unroll
        for (int k = 0; k < kEntries; ++k) {
          made.at[k] = packed<From, To>(found[turn].at[k], weighted, scale);
        }
        reinterpret_cast<Target*>(to)[first + turn * kWarp] = made;
      }
    }
  }
  for (int64_t column = groups * kEntries + lane; column < d; column += kWarp) {
    to[column] = packed<From, To>(from[column], weighted, scale);
  }
}

constexpr int kEdge = 32; // of a tile: a row of it is a full warp
constexpr int kLines = kEdge / kWarps;

template <typename T>
__device__ __forceinline__ double folded(double sum, const T* chunk, int64_t slots, int64_t slot_stride) {
  for (int64_t slot = 0; slot < slots; ++slot) {
    sum += static_cast<double>(chunk[slot * slot_stride]);
  }
  return sum;
}

// Row y of the grid holds tiles (y, y), (y, y + 1), ... and then those of row tiles - 1 - y: tiles + 1 in all.
template <typename T, bool kMirror>
__global__ void __launch_bounds__(kThreads) fold_triangle_kernel(
    double* acc, int64_t ld, int64_t d, int64_t tiles, const T* chunk, int64_t slots, int64_t slot_stride,
    int64_t ld_chunk) {
  __shared__ double turned[kMirror ? kEdge : 1][kEdge + 1];
  const int64_t x = blockIdx.x, y = blockIdx.y, front = tiles - y;
  if (x >= front && tiles - 1 - y == y) {
    return; // the middle row is its own partner
  }
  const int64_t tile_row = x < front ? y : tiles - 1 - y, tile_column = x < front ? y + x : x - 1;
  const int64_t top = tile_row * kEdge, left = tile_column * kEdge;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int line = 0; line < kLines; ++line) {
    const int r = line * kWarps + warp;
    const int64_t i = top + r, j = left + lane;
    if (j < d && i <= j) {
      const double sum = folded(acc[i * ld + j], chunk + i * ld_chunk + j, slots, slot_stride);
      acc[i * ld + j] = sum;
      if constexpr (kMirror) {
        turned[r][lane] = sum;
      }
    }
  }
  if constexpr (kMirror) {
    __syncthreads();
#pragma unroll
    for (int line = 0; line < kLines; ++line) {
      const int r = line * kWarps + warp;
      const int64_t i = left + r, j = top + lane;
      if (i < d && j < i) {
        acc[i * ld + j] = turned[lane][r];
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) fold_kernel(
    double* acc, int64_t ld, int64_t m, int64_t n, const T* chunk, int64_t slots, int64_t slot_stride,
    int64_t ld_chunk) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kEdge + lane;
  for (int64_t top = static_cast<int64_t>(blockIdx.y) * kEdge; top < m; top += static_cast<int64_t>(gridDim.y) * kEdge) {
#pragma unroll
    for (int line = 0; line < kLines; ++line) {
      const int64_t i = top + line * kWarps + warp;
      if (i < m && j < n) {
        acc[i * ld + j] = folded(acc[i * ld + j], chunk + i * ld_chunk + j, slots, slot_stride);
      }
    }
  }
}

template <typename From, typename To>
int pack(
    const void* x, int64_t ld, const int* kept, const int64_t* count, Float weight_type, const void* weight, int64_t rows,
    int64_t d, void* out, cudaStream_t stream) {
  constexpr int64_t kEntries = kAtOnce<From, To>;
  const bool from_aligned = reinterpret_cast<uintptr_t>(x) % (kEntries * sizeof(From)) == 0 && ld % kEntries == 0;
  const bool to_aligned = reinterpret_cast<uintptr_t>(out) % (kEntries * sizeof(To)) == 0 && d % kEntries == 0;
  const auto kernel = pack_kernel<From, To>;
  LF_LAUNCH(
      kernel, static_cast<unsigned>((rows + kWarps - 1) / kWarps), kThreads, 0, stream, static_cast<const From*>(x), ld,
      kept, count, weight_type, weight, rows, d, from_aligned && to_aligned ? d / kEntries : 0,
      static_cast<To*>(out));
  return launched();
}

template <typename T>
int fold(
    double* acc, int64_t ld, int64_t m, int64_t n, const void* chunk, int64_t slots, int64_t slot_stride,
    int64_t ld_chunk, bool symmetric, bool mirror, cudaStream_t stream) {
  const auto* from = static_cast<const T*>(chunk);
  const int64_t tiles = (m + kEdge - 1) / kEdge, across = (n + kEdge - 1) / kEdge;
  if (symmetric) {
    const auto kernel = mirror ? fold_triangle_kernel<T, true> : fold_triangle_kernel<T, false>;
    const dim3 grid(static_cast<unsigned>(tiles + 1), static_cast<unsigned>((tiles + 1) / 2));
    LF_LAUNCH(kernel, grid, kThreads, 0, stream, acc, ld, m, tiles, from, slots, slot_stride, ld_chunk);
  } else {
    const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(tiles < 65535 ? tiles : 65535));
    LF_LAUNCH(fold_kernel<T>, grid, kThreads, 0, stream, acc, ld, m, n, from, slots, slot_stride, ld_chunk);
  }
  return launched();
}

} // namespace

int cov_kept(const void* mask, int64_t T, int* kept, int64_t room, int64_t* count, cudaStream_t stream) {
  const auto* bytes = static_cast<const uint8_t*>(mask);
  const auto kernel = reinterpret_cast<uintptr_t>(mask) % kBytes == 0 ? kept_kernel<true> : kept_kernel<false>;
  LF_LAUNCH(kernel, 1u, kThreads, 0, stream, bytes, T, kept, room, count);
  return launched();
}

int cov_pack(
    Float from, const void* x, int64_t ld, const int* kept, const int64_t* count, Float weight_type, const void* weight,
    int64_t rows, int64_t d, Float to, void* out, cudaStream_t stream) {
  if (rows == 0 || d == 0) {
    return 0;
  }
  return for_float(from, [&](auto from_zero) {
    return for_float(to, [&](auto to_zero) {
      return pack<decltype(from_zero), decltype(to_zero)>(
          x, ld, kept, count, weight_type, weight, rows, d, out, stream);
    });
  });
}

int cov_fold(
    double* acc, int64_t ld, int64_t m, int64_t n, Float type, const void* chunk, int64_t slots, int64_t slot_stride,
    int64_t ld_chunk, bool symmetric, bool mirror, cudaStream_t stream) {
  if (m == 0 || n == 0) {
    return 0;
  }
  return type == Float::f32
      ? fold<float>(acc, ld, m, n, chunk, slots, slot_stride, ld_chunk, symmetric, mirror, stream)
      : fold<double>(acc, ld, m, n, chunk, slots, slot_stride, ld_chunk, symmetric, mirror, stream);
}

} // namespace loraforge::cuda
