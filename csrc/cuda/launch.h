// What launchers and their callers share. Neither torch nor CUDA headers: the callers are compiled by the host compiler.
#pragma once

#include <cstdint>

#if !defined(__CUDACC__) && !defined(LF_EMULATED)
typedef struct CUstream_st* cudaStream_t;
#endif

namespace loraforge::cuda {

// Float types by code, as pointers cross the border between kernels and callers without their type.
enum class Float : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// Text of a code that a launcher returned; 0 is success.
const char* error_text(int code);

} // namespace loraforge::cuda
