// Text of CUDA's error codes, for callers that see no CUDA header.
#include "device.cuh"
#include "launch.h"

namespace loraforge::cuda {

const char* error_text(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

} // namespace loraforge::cuda
