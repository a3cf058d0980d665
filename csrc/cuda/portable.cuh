// What lets the same source be compiled by nvcc for the device and by a C++ compiler for the tests without a GPU.
//
// The tests include a header that plays a block's threads one after the other (tests/native/cuda_emulation.h) before
// any of these files; then there is no nvcc, and DISTOPT_CUDA_EMULATION is defined.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define DISTOPT_HD __host__ __device__
#elif defined(DISTOPT_CUDA_EMULATION)
#define DISTOPT_HD
#else
#include <cuda_runtime_api.h>  // the binding: types and error names only
#define DISTOPT_HD
#endif
