// What every CUDA operator's caller does around its launch: device, stream, error.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "../common/checks.h"
#include "launch.h"

namespace loraforge::cuda {

using torch::stable::accelerator::DeviceGuard;

// All operands on one GPU: the dispatcher comes here as soon as one of them is.
struct Operand {
  const char* name;
  const Tensor& tensor;
};

inline void check_devices(const char* op, std::initializer_list<Operand> operands) {
  const Operand& first = *operands.begin();
  for (const Operand& other : operands) {
    if (!other.tensor.is_cuda() || other.tensor.get_device_index() != first.tensor.get_device_index()) {
      refuse(op, other.name, "another device", std::string("the GPU of ") + first.name);
    }
  }
}

// PyTorch's current stream of the tensor's GPU.
inline cudaStream_t stream_of(const Tensor& t) {
  void* stream = nullptr;
  // By hand: the macro for this is younger than torch 2.11.
  if (aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("PyTorch does not say what its current CUDA stream is");
  }
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op, int code) {
  if (code != 0) {
    throw std::runtime_error(std::string(op) + ": the CUDA launch failed: " + error_text(code));
  }
}

inline Float float_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Float::f32;
    case ScalarType::Double:
      return Float::f64;
    case ScalarType::BFloat16:
      return Float::bf16;
    default:
      return Float::f16;
  }
}

} // namespace loraforge::cuda
