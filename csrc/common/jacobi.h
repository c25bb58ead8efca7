// One-sided Jacobi on the columns of a small matrix: what the CPU and the CUDA form of jacobi_svd share.
//
// Source: Drmac and Veselic, SIAM J. Matrix Anal. Appl. 29 (2008): pivoted QR, then rotations of the columns of R^T.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace loraforge {

// Two columns are orthogonal when |x . y| <= tolerance |x| |y|. A result that is rounded to float32 needs no more than
// the first, which moves its last bit at most; the second is what a dot product in double can tell.
constexpr double kOrthogonal32 = 1.0 / (1 << 28), kOrthogonal64 = 4.0 / (int64_t{1} << 52);
// Squared norm, beside a largest entry of about 1, up to which a column is zero: products of two stay normal numbers.
constexpr double kNothing = 0x1p-480;

// x' = x + s (y - tau x), y' = y - s (x + tau y): a small angle changes little and so rounds little (Rutishauser).
struct Rotation {
  double s, tau;
  double shift; // what |x|^2 gains and |y|^2 loses
};

// Makes x and y orthogonal, for |x|^2 = big >= |y|^2 = small and dot = x . y.
LF_HD Rotation rotation_of(double big, double small, double dot) {
  const double d = big - small, g = 2.0 * dot;
  const double t = g / (d + sqrt(d * d + g * g));
  const double c = 1.0 / sqrt(1.0 + t * t), s = c * t;
  return {s, s / (1.0 + c), t * dot};
}

// Pair `index` of round `round`, for `slots` columns (an even number): in slots - 1 rounds of slots / 2 pairs every
// column meets every other once.
LF_HD void pair_of(int slots, int round, int index, int& p, int& q) {
  const int ring = slots - 1;
  p = index == 0 ? ring : (round + index) % ring;
  q = (round - index + ring) % ring;
}

} // namespace loraforge
