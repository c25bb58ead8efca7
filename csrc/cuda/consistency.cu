// Consistency loss: a warp takes a piece of one token's row at a time, so that rows of weight 0 cost no memory traffic.
//
// Bytes: forward 2 T H e, backward 3 T H e with e bytes an entry; both are bound by memory. A lane has up to 128 bytes
// on their way before it computes. Differences in float (double for double), squares and sums in double.
#include "consistency.h"

#include <cstring>

#include "../common/consistency.h"
#include "device.cuh"

namespace loraforge::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTurns = 4; // loads of a piece by a lane, from each of P and S
constexpr int64_t kMaxBlocks = 1056; // twice what 132 multiprocessors hold at once

template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// What a lane loads at once, as words: 16-bit entries stay two to a register until they are needed.
struct alignas(16) Pack {
  unsigned at[4];
};

template <typename T>
constexpr int kEntries = static_cast<int>(sizeof(Pack) / sizeof(T));

template <typename T>
constexpr int64_t kPiece = int64_t{kWarp} * kEntries<T> * kTurns;

// Entry k of a pack in the type that differences are taken in; k is known when this is compiled.
template <typename T>
__device__ __forceinline__ Wide<T> entry(const Pack& pack, int k) {
  if constexpr (std::is_same_v<T, double>) {
    const auto low = static_cast<long long>(pack.at[2 * k]), high = static_cast<long long>(pack.at[2 * k + 1]);
    return __longlong_as_double(high << 32 | low);
  } else if constexpr (std::is_same_v<T, float>) {
    return __uint_as_float(pack.at[k]);
  } else if constexpr (std::is_same_v<T, Bf16>) {
    return __uint_as_float(k % 2 == 0 ? pack.at[k / 2] << 16 : pack.at[k / 2] & 0xFFFF0000u);
  } else {
    return as_float(F16{static_cast<uint16_t>(pack.at[k / 2] >> (k % 2 * 16))});
  }
}

template <typename T, bool kAligned>
__device__ __forceinline__ void load_pack(const T* row, int64_t at, int64_t end, Pack& to) {
  if constexpr (kAligned) { // the width is then a multiple of the pack
    to = at < end ? *reinterpret_cast<const Pack*>(row + at) : Pack{};
  } else {
    T entries[kEntries<T>];
#pragma unroll
    for (int k = 0; k < kEntries<T>; ++k) {
      entries[k] = at + k < end ? row[at + k] : T{};
    }
    memcpy(&to, entries, sizeof(to));
  }
}

template <typename T, bool kAligned>
__device__ __forceinline__ void store_pack(const T (&entries)[kEntries<T>], T* row, int64_t at, int64_t end) {
  if constexpr (kAligned) {
    Pack pack;
    memcpy(&pack, entries, sizeof(pack));
    if (at < end) {
      *reinterpret_cast<Pack*>(row + at) = pack;
    }
  } else {
#pragma unroll
    for (int k = 0; k < kEntries<T>; ++k) {
      if (at + k < end) {
        row[at + k] = entries[k];
      }
    }
  }
}

__device__ __forceinline__ double weight_of(Mask kind, const void* mask, int64_t token) {
  switch (kind) {
    case Mask::none:
      return 1.0;
    case Mask::bytes:
      return static_cast<const unsigned char*>(mask)[token] != 0 ? 1.0 : 0.0;
    case Mask::f32:
      return static_cast<double>(static_cast<const float*>(mask)[token]);
    default:
      return static_cast<const double*>(mask)[token];
  }
}

__device__ __forceinline__ double limit_of(const ConsistencyInput& in) {
  return in.unit == nullptr ? in.threshold : in.threshold * *in.unit;
}

// The pieces of this warp in turn, without a division after the first.
struct Walk {
  int64_t token, piece, pieces, token_step, piece_step;

  __device__ __forceinline__ Walk(int64_t pieces) : pieces(pieces) {
    const int64_t first = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp, step = int64_t{gridDim.x} * kWarps;
    token = first / pieces, piece = first % pieces;
    token_step = step / pieces, piece_step = step % pieces;
  }
  __device__ __forceinline__ void next() {
    token += token_step, piece += piece_step;
    if (piece >= pieces) {
      piece -= pieces;
      ++token;
    }
  }
};

// Partial sums of the pieces of a block; the block that finishes last adds the partials in their order.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kAligned ? 4 : 2)
    forward_kernel(ConsistencyInput in, int64_t pieces, double* partial, unsigned* ticket, double* out) {
  constexpr int kSums = 2;
  __shared__ double scratch[kWarp];
  __shared__ unsigned place;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const Wide<T> bound = kept_above<Wide<T>>(in.rule, limit_of(in));
  double sum = 0.0;
  for (Walk at(pieces); at.token < in.tokens; at.next()) {
    const double weight = weight_of(in.mask_kind, in.mask, at.token);
    if (weight == 0.0) {
      continue; // selected, not multiplied: the row may hold NaN
    }
    const T* p = static_cast<const T*>(in.P) + at.token * in.width;
    const T* s = static_cast<const T*>(in.S) + at.token * in.width;
    const int64_t begin = at.piece * kPiece<T> + lane * kEntries<T>;
    Pack x[kTurns], y[kTurns];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      load_pack<T, kAligned>(p, begin + turn * kWarp * kEntries<T>, in.width, x[turn]);
      load_pack<T, kAligned>(s, begin + turn * kWarp * kEntries<T>, in.width, y[turn]);
    }
    double sums[kSums] = {};
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
#pragma unroll
      for (int k = 0; k < kEntries<T>; ++k) {
        const Wide<T> d = entry<T>(x[turn], k) - entry<T>(y[turn], k);
        const double cost = d > bound ? 0.0 : static_cast<double>(d);
        sums[k % kSums] += cost * cost;
      }
    }
    sum += weight * (sums[0] + sums[1]);
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence(); // the partial above is seen by whichever block comes last
    place = atomicAdd(ticket, 1u);
  }
  __syncthreads();
  if (place + 1 != gridDim.x) {
    return;
  }
  __threadfence();
  sum = 0.0;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads) {
    sum += partial[block];
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) {
    *out = sum;
    *ticket = 0u;
  }
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kAligned ? 4 : 2)
    backward_kernel(ConsistencyInput in, int64_t pieces, const double* grad, T* out) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const Wide<T> bound = kept_above<Wide<T>>(in.rule, limit_of(in));
  const double twice = 2.0 * *grad;
  for (Walk at(pieces); at.token < in.tokens; at.next()) {
    const double weight = weight_of(in.mask_kind, in.mask, at.token);
    const Wide<T> factor = static_cast<Wide<T>>(twice * weight);
    const T* p = static_cast<const T*>(in.P) + at.token * in.width;
    const T* s = static_cast<const T*>(in.S) + at.token * in.width;
    T* to = out + at.token * in.width;
    const int64_t begin = at.piece * kPiece<T> + lane * kEntries<T>;
    Pack x[kTurns], y[kTurns];
    if (weight != 0.0) { // the same for the whole warp
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        load_pack<T, kAligned>(p, begin + turn * kWarp * kEntries<T>, in.width, x[turn]);
        load_pack<T, kAligned>(s, begin + turn * kWarp * kEntries<T>, in.width, y[turn]);
      }
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      T slopes[kEntries<T>] = {};
      if (weight != 0.0) {
#pragma unroll
        for (int k = 0; k < kEntries<T>; ++k) {
          const Wide<T> d = entry<T>(x[turn], k) - entry<T>(y[turn], k);
          slopes[k] = d > bound ? T{} : store_as<T>(d * factor);
        }
      }
      store_pack<T, kAligned>(slopes, to, begin + turn * kWarp * kEntries<T>, in.width);
    }
  }
}

template <typename T>
int64_t pieces_of(int64_t width) {
  return width > kPiece<T> ? (width + kPiece<T> - 1) / kPiece<T> : 1;
}

template <typename T>
int64_t blocks_of(int64_t tokens, int64_t width) {
  const int64_t blocks = (tokens * pieces_of<T>(width) + kWarps - 1) / kWarps;
  return blocks < 1 ? 1 : blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

template <typename T>
bool aligned(const ConsistencyInput& in, const void* out) {
  const auto whole = [](const void* start) { return reinterpret_cast<uintptr_t>(start) % sizeof(Pack) == 0; };
  return in.width % kEntries<T> == 0 && whole(in.P) && whole(in.S) && whole(out);
}

} // namespace

int64_t consistency_blocks(const ConsistencyInput& input) {
  int64_t blocks = 0;
  for_float(input.kind, [&](auto zero) {
    blocks = blocks_of<decltype(zero)>(input.tokens, input.width);
    return 0;
  });
  return blocks;
}

int consistency_forward(
    const ConsistencyInput& input, double* partial, unsigned* ticket, double* out, cudaStream_t stream) {
  return for_float(input.kind, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = aligned<T>(input, nullptr) ? forward_kernel<T, true> : forward_kernel<T, false>;
    const auto blocks = static_cast<unsigned>(blocks_of<T>(input.tokens, input.width));
    LF_LAUNCH(kernel, blocks, kThreads, 0, stream, input, pieces_of<T>(input.width), partial, ticket, out);
    return launched();
  });
}

int consistency_backward(const ConsistencyInput& input, const double* grad, void* out, cudaStream_t stream) {
  if (input.tokens == 0 || input.width == 0) {
    return 0;
  }
  return for_float(input.kind, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = aligned<T>(input, out) ? backward_kernel<T, true> : backward_kernel<T, false>;
    const auto blocks = static_cast<unsigned>(blocks_of<T>(input.tokens, input.width));
    LF_LAUNCH(kernel, blocks, kThreads, 0, stream, input, pieces_of<T>(input.width), grad, static_cast<T*>(out));
    return launched();
  });
}

} // namespace loraforge::cuda
