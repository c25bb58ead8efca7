// CUDA's thread model on the CPU, so that the text of a kernel runs where no GPU is.
//
// Blocks run one after another; the threads of a block are fibers that change over at barriers and shuffles (fast, one
// order, and divergent barriers are seen), or, with LF_EMULATOR_THREADS, threads of the operating system, whose races the
// sanitizers find. __shared__ memory is static, dynamic shared memory is allocated to the byte at every launch.
//
// Stricter than a GPU: a barrier that not all threads of a block reach from the same line ends the program with a word
// about it, and so does a shuffle that not all lanes of a warp take part in. Weaker: warps do not run in lockstep, blocks
// never run at once, and rsqrt and exp are the host's.
#pragma once

#define LF_EMULATED 1

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if !defined(__x86_64__) && !defined(LF_EMULATOR_THREADS)
#define LF_EMULATOR_THREADS 1
#endif
#ifdef LF_EMULATOR_THREADS
#include <condition_variable>
#include <mutex>
#include <thread>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) alignas(n)
#define __ldg(pointer) (*(pointer))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

typedef struct CUstream_st* cudaStream_t;
typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "no error";
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}

namespace emulator {

constexpr int kLanes = 32;
constexpr size_t kSharedLimit = 227 * 1024; // of a block on sm_90
constexpr size_t kSharedDefault = 48 * 1024;

[[noreturn]] inline void fail(const char* what, const char* file, int line) {
  std::fprintf(stderr, "emulator: %s (%s:%d)\n", what, file, line);
  std::fflush(stderr);
  std::_Exit(3);
}

struct Barrier {
  unsigned expected = 0;
  unsigned arrived = 0;
  unsigned gone = 0; // threads of it that have returned
  uint64_t generation = 0;
  const char* file = "";
  int line = 0;
#ifdef LF_EMULATOR_THREADS
  std::mutex mutex;
  std::condition_variable changed;
#endif
};

struct Warp {
  Barrier barrier;
  uint64_t slots[2][kLanes] = {};
};

struct Block {
  dim3 grid, block, index;
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  unsigned char* shared = nullptr;
  unsigned votes[3] = {};
};

struct Lane {
  Block* block = nullptr;
  dim3 index;
  unsigned flat = 0;
  unsigned exchanges = 0; // shuffles use the two rows of slots in turn: one barrier each is enough
  unsigned counts = 0;
  void* stack_pointer = nullptr;
};

inline thread_local Lane* current = nullptr;

inline Lane& here() {
  return *current;
}
inline Warp& warp_here() {
  return *here().block->warps[here().flat / kLanes];
}

// One more thread is at the barrier; true where it is the last, which opens it.
inline bool arrive(Barrier& barrier, const char* file, int line) {
  if (barrier.gone != 0) {
    fail("a barrier is reached by some threads after others have returned", file, line);
  }
  if (barrier.arrived != 0 && (barrier.line != line || std::strcmp(barrier.file, file) != 0)) {
    fail("threads wait at different barriers", file, line);
  }
  barrier.file = file, barrier.line = line;
  if (++barrier.arrived != barrier.expected) {
    return false;
  }
  barrier.arrived = 0;
  ++barrier.generation;
  return true;
}

// A thread has returned and will never be at the barrier again.
inline void depart(Barrier& barrier) {
  if (barrier.arrived != 0) {
    fail("a thread returned while others wait at a barrier", barrier.file, barrier.line);
  }
  ++barrier.gone;
}

#ifdef LF_EMULATOR_THREADS

inline void wait(Barrier& barrier, const char* file, int line) {
  std::unique_lock<std::mutex> lock(barrier.mutex);
  const uint64_t generation = barrier.generation;
  if (arrive(barrier, file, line)) {
    barrier.changed.notify_all();
    return;
  }
  barrier.changed.wait(lock, [&] { return barrier.generation != generation; });
}

inline void leave(Barrier& barrier) {
  const std::unique_lock<std::mutex> lock(barrier.mutex);
  depart(barrier);
}

#else

// Saves the callee's registers on the old stack and goes on where the new one stopped.
extern "C" void lf_emulator_switch(void** from, void* to);
asm(R"(
.text
.weak lf_emulator_switch
.type lf_emulator_switch, @function
lf_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lf_emulator_switch, .-lf_emulator_switch
)");

struct Scheduler {
  std::vector<Lane> lanes;
  std::vector<unsigned> alive; // in the order of their turns
  size_t turn = 0;
  uint64_t idle = 0; // changes since a barrier last opened or a thread last ended
  void* main = nullptr;
  const std::function<void()>* body = nullptr;
};

inline Scheduler& scheduler() {
  static Scheduler one;
  return one;
}

inline void yield(const char* file, int line) {
  Scheduler& s = scheduler();
  Lane* before = current;
  if (++s.idle > 2 * s.alive.size()) {
    fail("threads wait at different barriers, or for threads that have returned", file, line);
  }
  s.turn = (s.turn + 1) % s.alive.size();
  current = &s.lanes[s.alive[s.turn]];
  if (current != before) {
    lf_emulator_switch(&before->stack_pointer, current->stack_pointer);
  }
}

inline void wait(Barrier& barrier, const char* file, int line) {
  const uint64_t generation = barrier.generation;
  if (arrive(barrier, file, line)) {
    scheduler().idle = 0;
    return;
  }
  while (barrier.generation == generation) {
    yield(file, line);
  }
}

inline void leave(Barrier& barrier) {
  depart(barrier); // fibers change over at barriers only: nothing to lock
}

inline void run_fiber() {
  Scheduler& s = scheduler();
  (*s.body)();
  leave(warp_here().barrier);
  leave(here().block->barrier);
  s.idle = 0;
  s.alive.erase(s.alive.begin() + static_cast<std::ptrdiff_t>(s.turn));
  Lane* before = current;
  if (s.alive.empty()) {
    current = nullptr;
    lf_emulator_switch(&before->stack_pointer, s.main);
  }
  s.turn %= s.alive.size();
  current = &s.lanes[s.alive[s.turn]];
  lf_emulator_switch(&before->stack_pointer, current->stack_pointer);
  std::abort(); // a thread that ended is never resumed
}

#endif

template <typename Body>
void run_block(Block& block, const Body& body) {
  const unsigned threads = block.block.x * block.block.y * block.block.z;
  block.barrier.expected = threads;
  for (unsigned first = 0; first < threads; first += kLanes) {
    block.warps.push_back(std::make_unique<Warp>());
    block.warps.back()->barrier.expected = threads - first < kLanes ? threads - first : kLanes;
  }
  std::vector<Lane> lanes(threads);
  for (unsigned flat = 0; flat < threads; ++flat) {
    Lane& lane = lanes[flat];
    lane.block = &block;
    lane.flat = flat;
    lane.index = dim3(
        flat % block.block.x, flat / block.block.x % block.block.y, flat / (block.block.x * block.block.y));
  }
#ifdef LF_EMULATOR_THREADS
  std::vector<std::thread> running;
  for (unsigned flat = 0; flat < threads; ++flat) {
    running.emplace_back([&, flat] {
      current = &lanes[flat];
      body();
      leave(warp_here().barrier);
      leave(block.barrier);
    });
  }
  for (std::thread& one : running) {
    one.join();
  }
#else
  constexpr size_t kStack = 64 * 1024;
  static std::vector<std::unique_ptr<unsigned char[]>> stacks;
  while (stacks.size() < threads) {
    stacks.emplace_back(new unsigned char[kStack]);
  }
  const std::function<void()> run = body;
  Scheduler& s = scheduler();
  s.lanes = std::move(lanes);
  s.alive.clear();
  s.body = &run;
  s.turn = 0;
  s.idle = 0;
  for (unsigned flat = 0; flat < threads; ++flat) {
    // A fresh stack looks as if run_fiber had been about to be returned to: six registers, the address, alignment.
    auto top = reinterpret_cast<uintptr_t>(stacks[flat].get() + kStack) & ~uintptr_t{15};
    auto* frame = reinterpret_cast<void**>(top) - 8;
    std::memset(frame, 0, 8 * sizeof(void*));
    frame[6] = reinterpret_cast<void*>(&run_fiber);
    s.lanes[flat].stack_pointer = frame;
    s.alive.push_back(flat);
  }
  current = &s.lanes[0];
  lf_emulator_switch(&s.main, current->stack_pointer);
#endif
}

inline std::vector<std::pair<const void*, size_t>>& shared_limits() {
  static std::vector<std::pair<const void*, size_t>> raised;
  return raised;
}

template <typename Kernel, typename... Arguments>
void launch(
    const char* file, int line, Kernel kernel, dim3 grid, dim3 block, size_t shared, Arguments... arguments) {
  const unsigned threads = block.x * block.y * block.z;
  if (grid.x * grid.y * grid.z == 0 || threads == 0 || threads > 1024 || grid.y > 65535 || grid.z > 65535) {
    fail("a launch of an empty or too large grid", file, line);
  }
  size_t limit = kSharedDefault;
  for (const auto& [name, bytes] : shared_limits()) {
    limit = name == reinterpret_cast<const void*>(kernel) && bytes > limit ? bytes : limit;
  }
  if (shared > limit || shared > kSharedLimit) {
    fail("more dynamic shared memory than the kernel was given", file, line);
  }
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        Block here;
        here.grid = grid, here.block = block, here.index = dim3(x, y, z);
        // To the byte, so that AddressSanitizer sees the first entry beyond; filled with what no kernel may count on.
        std::unique_ptr<unsigned char[]> bytes(shared == 0 ? nullptr : new unsigned char[shared]);
        if (shared != 0) {
          std::memset(bytes.get(), 0xA5, shared);
        }
        here.shared = bytes.get();
        run_block(here, [&] { kernel(arguments...); });
      }
    }
  }
}

template <typename T>
T exchange(T value, unsigned source, const char* file, int line) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most eight bytes");
  Lane& lane = here();
  Warp& warp = warp_here();
  uint64_t* slots = warp.slots[lane.exchanges++ % 2];
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  slots[lane.flat % kLanes] = bits;
  wait(warp.barrier, file, line);
  const unsigned from = source < warp.barrier.expected ? source : lane.flat % kLanes;
  std::memcpy(&value, &slots[from], sizeof(T));
  return value;
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, const char* file, int line) {
  if (mask != 0xFFFFFFFFu) {
    fail("a shuffle of part of a warp", file, line);
  }
  return exchange(value, source, file, line);
}

inline unsigned ballot(unsigned mask, bool vote, const char* file, int line) {
  if (mask != 0xFFFFFFFFu) {
    fail("a vote of part of a warp", file, line);
  }
  Lane& lane = here();
  Warp& warp = warp_here();
  uint64_t* slots = warp.slots[lane.exchanges++ % 2];
  slots[lane.flat % kLanes] = vote;
  wait(warp.barrier, file, line);
  unsigned votes = 0;
  for (unsigned other = 0; other < warp.barrier.expected; ++other) {
    votes |= slots[other] != 0 ? 1u << other : 0u;
  }
  return votes;
}

// Number of threads of the block whose vote is not 0.
inline int block_count(int vote, const char* file, int line) {
  Lane& lane = here();
  Block& block = *lane.block;
  unsigned* row = block.votes;
  const unsigned at = lane.counts++ % 3;
  __atomic_fetch_add(&row[at], vote != 0 ? 1u : 0u, __ATOMIC_RELAXED);
  wait(block.barrier, file, line);
  const unsigned total = __atomic_load_n(&row[at], __ATOMIC_RELAXED);
  if (lane.flat == 0) {
    __atomic_store_n(&row[(at + 2) % 3], 0u, __ATOMIC_RELAXED); // read before the barrier above, used after the next
  }
  return static_cast<int>(total);
}

} // namespace emulator

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  if (static_cast<size_t>(bytes) > emulator::kSharedLimit) {
    return 1;
  }
  emulator::shared_limits().emplace_back(reinterpret_cast<const void*>(kernel), static_cast<size_t>(bytes));
  return cudaSuccess;
}

#define threadIdx (::emulator::here().index)
#define blockIdx (::emulator::here().block->index)
#define blockDim (::emulator::here().block->block)
#define gridDim (::emulator::here().block->grid)

#define LF_LAUNCH(kernel, grid, block, shared, stream, ...) \
  (static_cast<void>(stream), ::emulator::launch(__FILE__, __LINE__, kernel, dim3(grid), dim3(block), shared, __VA_ARGS__))
#define LF_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(::emulator::here().block->shared)

#define __syncthreads() ::emulator::wait(::emulator::here().block->barrier, __FILE__, __LINE__)
#define __syncwarp(...) ::emulator::wait(::emulator::warp_here().barrier, __FILE__, __LINE__)
#define __syncthreads_count(vote) ::emulator::block_count(vote, __FILE__, __LINE__)
#define __syncthreads_or(vote) (::emulator::block_count(vote, __FILE__, __LINE__) != 0)
#define __shfl_sync(mask, value, source) ::emulator::shuffle(mask, value, source, __FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, bits) \
  ::emulator::shuffle(mask, value, (::emulator::here().flat % ::emulator::kLanes) ^ (bits), __FILE__, __LINE__)
#define __shfl_down_sync(mask, value, by) \
  ::emulator::shuffle(mask, value, ::emulator::here().flat % ::emulator::kLanes + (by), __FILE__, __LINE__)
#define __shfl_up_sync(mask, value, by) \
  ::emulator::shuffle(mask, value, ::emulator::here().flat % ::emulator::kLanes - (by), __FILE__, __LINE__)
#define __ballot_sync(mask, vote) ::emulator::ballot(mask, vote, __FILE__, __LINE__)
#define __any_sync(mask, vote) (::emulator::ballot(mask, vote, __FILE__, __LINE__) != 0)

inline void __threadfence() {} // blocks run one after another
inline void __threadfence_block() {}

template <typename T>
T atomicAdd(T* at, T value) {
  static_assert(std::is_integral_v<T>, "sums of floats by atomics have no fixed order");
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicOr(T* at, T value) {
  return __atomic_fetch_or(at, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicMax(T* at, T value) {
  static_assert(std::is_integral_v<T>, "whole numbers only");
  T seen = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (seen < value && !__atomic_compare_exchange_n(at, &seen, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}

template <typename To, typename From>
To emulated_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same number of bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline unsigned __float_as_uint(float x) {
  return emulated_bits<unsigned>(x);
}
inline float __uint_as_float(unsigned x) {
  return emulated_bits<float>(x);
}
inline long long __double_as_longlong(double x) {
  return emulated_bits<long long>(x);
}
inline double __longlong_as_double(long long x) {
  return emulated_bits<double>(x);
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline double __dmul_rn(double a, double b) {
  return a * b;
}
inline double __dadd_rn(double a, double b) {
  return a + b;
}
inline double rsqrt(double x) {
  return 1.0 / std::sqrt(x);
}
inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}

struct __half {
  uint16_t bits;
};
inline __half __ushort_as_half(uint16_t bits) {
  return __half{bits};
}
inline uint16_t __half_as_ushort(__half x) {
  return x.bits;
}
inline float __half2float(__half x) {
  return static_cast<float>(emulated_bits<_Float16>(x.bits));
}
inline __half __float2half_rn(float x) {
  return __half{emulated_bits<uint16_t>(static_cast<_Float16>(x))};
}
