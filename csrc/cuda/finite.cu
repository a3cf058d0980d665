// Whether a tensor holds neither NaN nor Inf: no element has all exponent bits set.
#include "collectives.cuh"
#include "kernels.h"

namespace distopt::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAhead = 8;  // loads in flight
constexpr int64_t kMostBlocks = 4096;

__global__ void set_kernel(bool* result) { *result = true; }

// `Word` has the bits of one element.
template <class Word>
__global__ void __launch_bounds__(kThreads) finite_kernel(const Word* x, int64_t numel, Word exponent, bool* result) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  bool finite = true;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; first < numel;
       first += kAhead * step) {
    Word word[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) word[a] = first + a * step < numel ? x[first + a * step] : Word{0};
#pragma unroll
    for (int a = 0; a < kAhead; ++a) finite = finite && (word[a] & exponent) != exponent;
  }
  if (!finite) store_bool(result, false);  // all who write write the same
}

template <class Word>
cudaError_t run(const void* x, int64_t numel, Word exponent, bool* result, cudaStream_t stream) {
  Launcher launch{stream};
  launch(set_kernel, 1, 1, result);
  const int64_t blocks = least(kMostBlocks, ceil_div(numel, kThreads * kAhead));
  launch(finite_kernel<Word>, blocks, kThreads, static_cast<const Word*>(x), numel, exponent, result);
  return launch.error;
}

}  // namespace

cudaError_t all_finite(DType dtype, const void* x, int64_t numel, bool* result, cudaStream_t stream) {
  switch (dtype) {
    case DType::kFloat32:
      return run<uint32_t>(x, numel, 0x7f800000, result, stream);
    case DType::kBFloat16:
      return run<uint16_t>(x, numel, 0x7f80, result, stream);
    case DType::kFloat16:
      return run<uint16_t>(x, numel, 0x7c00, result, stream);
    case DType::kFloat64:
      return run<uint64_t>(x, numel, 0x7ff0000000000000, result, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace distopt::cuda
