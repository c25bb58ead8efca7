// The rules of the consistency loss as one comparison. Torch-free: the CPU and the CUDA form share it.
#pragma once

#include <cmath>

#include "host_device.h"

namespace loraforge {

// As in loraforge/kernels/consistency.py (RULES).
enum ConsistencyRule : int { kElementwise = 0, kMargin = 1, kDeadband = 2, kNoRule = 3, kConsistencyRules = 4 };

LF_HD float next_below(float x) {
  return nextafterf(x, -INFINITY);
}

LF_HD double next_below(double x) {
  return nextafter(x, -static_cast<double>(INFINITY));
}

// A difference d = p - s above this bound costs nothing, and every other one, NaN too, costs d^2. T is the type that
// differences are taken in. deadband keeps d >= -threshold: what is above the next number below -threshold.
template <typename T>
LF_HD T kept_above(int rule, double threshold) {
  switch (rule) {
    case kElementwise:
      return T(0);
    case kMargin:
      return static_cast<T>(threshold);
    case kDeadband:
      return next_below(static_cast<T>(-threshold));
    default:
      return static_cast<T>(INFINITY);
  }
}

} // namespace loraforge
