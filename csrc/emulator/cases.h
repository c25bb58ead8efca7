// A case reads named arrays and numbers, calls a launcher, and writes named arrays. Host pointers stand for device ones.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cuda/launch.h"

namespace emulator {

// An array of its exact number of bytes, so that AddressSanitizer sees the first entry beyond it.
struct Array {
  std::string dtype; // "f32", "f64", "bf16", "f16", "u8", "i32", "i64"
  std::vector<int64_t> shape;
  std::unique_ptr<unsigned char[]> bytes;
  size_t size = 0;
};

inline size_t width(const std::string& dtype) {
  if (dtype == "f64" || dtype == "i64") {
    return 8;
  }
  if (dtype == "f32" || dtype == "i32") {
    return 4;
  }
  return dtype == "u8" ? 1 : 2;
}

inline Array make_array(const std::string& dtype, const std::vector<int64_t>& shape) {
  Array array{dtype, shape, nullptr, width(dtype)};
  for (int64_t n : shape) {
    array.size *= static_cast<size_t>(n);
  }
  array.bytes.reset(new unsigned char[array.size]);
  return array;
}

class Case {
 public:
  std::map<std::string, Array> inputs, outputs;

  bool has(const std::string& name) const {
    return inputs.count(name) != 0;
  }
  const Array& array(const std::string& name) const {
    const auto found = inputs.find(name);
    if (found == inputs.end()) {
      throw std::runtime_error("no input named " + name);
    }
    return found->second;
  }
  // Null where the input is not given.
  template <typename T = void>
  T* data(const std::string& name) const {
    return has(name) ? reinterpret_cast<T*>(array(name).bytes.get()) : nullptr;
  }
  int64_t size(const std::string& name, size_t axis) const {
    return array(name).shape.at(axis);
  }
  loraforge::cuda::Float kind(const std::string& name) const {
    const std::string& dtype = array(name).dtype;
    using loraforge::cuda::Float;
    return dtype == "f64" ? Float::f64 : dtype == "f32" ? Float::f32 : dtype == "bf16" ? Float::bf16 : Float::f16;
  }
  // Numbers come as arrays of one f64 or i64.
  double number(const std::string& name) const {
    return *data<double>(name.c_str());
  }
  int64_t integer(const std::string& name) const {
    array(name);
    return *data<int64_t>(name);
  }
  // A result, uninitialised.
  template <typename T = void>
  T* make(const std::string& name, const std::string& dtype, const std::vector<int64_t>& shape) {
    Array& array = outputs[name] = make_array(dtype, shape);
    std::memset(array.bytes.get(), 0xA5, array.size); // no kernel may count on zeros
    return reinterpret_cast<T*>(array.bytes.get());
  }
};

using Function = std::function<int(Case&)>;

inline std::map<std::string, Function>& cases() {
  static std::map<std::string, Function> all;
  return all;
}

struct Registered {
  Registered(const char* name, Function function) {
    cases()[name] = std::move(function);
  }
};

} // namespace emulator

// LF_CASE(name) { ... return code of the launcher; }   with `c` the case.
#define LF_CASE(name)                                                      \
  static int lf_case_##name(::emulator::Case& c);                          \
  static const ::emulator::Registered lf_registered_##name(#name, lf_case_##name); \
  static int lf_case_##name(::emulator::Case& c)
