// Checks shared by all operators. Every message names the operator, the tensor, what came and what was expected.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace loraforge {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int64_t axis = 0; axis < t.dim(); ++axis) {
    text += (axis ? ", " : "") + std::to_string(t.size(axis));
  }
  return text + (t.dim() == 1 ? ",)" : ")");
}

[[noreturn]] inline void refuse(
    const char* op, const char* name, const std::string& got, const std::string& expected) {
  throw std::runtime_error(std::string(op) + ": " + name + " has " + got + ", expected " + expected);
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim, const char* shape) {
  if (t.dim() != dim) {
    refuse(op, name, "shape " + shape_of(t), std::string("shape ") + shape);
  }
}

inline void check_size(
    const char* op, const char* name, const Tensor& t, int64_t axis, int64_t size, const char* why) {
  if (t.size(axis) != size) {
    refuse(
        op, name, "shape " + shape_of(t),
        "size " + std::to_string(size) + " along axis " + std::to_string(axis) + " (" + why + ")");
  }
}

inline void check_dtype(
    const char* op, const char* name, const Tensor& t, std::initializer_list<ScalarType> allowed) {
  std::string names;
  for (ScalarType dtype : allowed) {
    if (t.scalar_type() == dtype) {
      return;
    }
    names += (names.empty() ? "" : " or ") + std::string(torch::headeronly::toString(dtype));
  }
  refuse(op, name, std::string("dtype ") + torch::headeronly::toString(t.scalar_type()), "dtype " + names);
}

} // namespace loraforge
