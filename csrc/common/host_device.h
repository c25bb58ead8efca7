// Functions that the CPU operators, the CUDA kernels and the emulator share.
#pragma once

#if defined(__CUDACC__)
#define LF_HD __host__ __device__ __forceinline__
#else
#define LF_HD inline
#endif
