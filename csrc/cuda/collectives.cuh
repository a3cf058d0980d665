// What the threads of a warp or a block do together, and how a kernel is launched.
#pragma once

#include "geometry.cuh"
#include "portable.cuh"

namespace distopt::cuda {

// The block's shared memory, laid out as a struct. Call it once per kernel.
template <class Shared>
__device__ inline Shared& block_shared() {
#if defined(__CUDACC__)
  __shared__ alignas(16) unsigned char storage[sizeof(Shared)];
  return *reinterpret_cast<Shared*>(storage);
#else
  return *static_cast<Shared*>(emulation::block_memory(sizeof(Shared)));
#endif
}

// For a flag that many threads set to one value at the same time.
__device__ inline void store_bool(bool* flag, bool value) {
#if defined(__CUDACC__)
  *static_cast<volatile bool*>(flag) = value;
#else
  __atomic_store_n(flag, value, __ATOMIC_RELAXED);
#endif
}

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ inline unsigned lanes_before() { return (1u << lane()) - 1; }

// All lanes of the warp must call these.
template <class T>
__device__ inline T warp_inclusive_sum(T value) {
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const T other = __shfl_up_sync(kAllLanes, value, distance);
    if (lane() >= distance) value += other;
  }
  return value;
}

template <class T>
__device__ inline T warp_sum(T value) {
  return __shfl_sync(kAllLanes, warp_inclusive_sum(value), kWarp - 1);
}

// The sum over the threads before this one; `total` is that over all. All threads of the block must call it, and pass a
// barrier before `warp_sums` (kWarp entries, shared) is used again.
template <class T>
__device__ inline T block_exclusive_sum(T value, T* warp_sums, T* total) {
  const T inclusive = warp_inclusive_sum(value);
  if (lane() == kWarp - 1) warp_sums[warp()] = inclusive;
  __syncthreads();
  const int num_warps = static_cast<int>(blockDim.x) / kWarp;
  const T of_warps = warp_inclusive_sum(lane() < num_warps ? warp_sums[lane()] : T{0});
  *total = __shfl_sync(kAllLanes, of_warps, kWarp - 1);
  const T of_warps_before = __shfl_sync(kAllLanes, of_warps, warp() ? warp() - 1 : 0);
  return (warp() ? of_warps_before : T{0}) + inclusive - value;
}

// Enqueues kernels one after the other and keeps the first error.
struct Launcher {
  cudaStream_t stream;
  cudaError_t error = cudaSuccess;

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, const Arguments&... arguments) {
    if (blocks == 0 || error != cudaSuccess) return;
#if defined(__CUDACC__)
    kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(arguments...);
    error = cudaGetLastError();
#else
    emulation::run(blocks, threads, [&] { kernel(arguments...); });
#endif
  }
};

}  // namespace distopt::cuda
