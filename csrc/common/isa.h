// One binary for every x86-64 machine: hot loops are compiled three times and the loader picks at run time. Elsewhere
// (other processors, clang, a C library without ifunc) the compiler's own vector code for the build's target is used.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__GLIBC__) && \
    !defined(LORAFORGE_NATIVE)
#define LORAFORGE_HAS_CLONES 1
#define LF_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LORAFORGE_HAS_CLONES 0
#define LF_CLONES
#endif

// Bodies are inlined into each clone, so that they are compiled for the clone's processor.
#define LF_BODY [[gnu::always_inline]] inline

namespace loraforge {

// Eight lanes are one AVX-512 register, two AVX or four SSE registers of doubles: the lane layout, and with it the order
// of every sum, is the same in all clones.
constexpr int64_t kLanes = 8;
typedef double DoubleLanes __attribute__((vector_size(64)));
typedef float FloatLanes __attribute__((vector_size(32)));

LF_BODY void load_lanes(const double* from, DoubleLanes& to) {
  std::memcpy(&to, from, sizeof(to));
}

LF_BODY void load_lanes(const float* from, DoubleLanes& to) {
  FloatLanes narrow;
  std::memcpy(&narrow, from, sizeof(narrow));
  to = __builtin_convertvector(narrow, DoubleLanes);
}

LF_BODY void store_lanes(const DoubleLanes& from, double* to) {
  std::memcpy(to, &from, sizeof(from));
}

LF_BODY void store_lanes(const DoubleLanes& from, float* to) {
  const FloatLanes narrow = __builtin_convertvector(from, FloatLanes);
  std::memcpy(to, &narrow, sizeof(narrow));
}

// Pairwise, in a fixed order.
LF_BODY double sum_lanes(const DoubleLanes& v) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

} // namespace loraforge
