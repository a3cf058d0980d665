// Decoding: adds received (index, value) pairs into a dense tensor.
//
// The indices of one call differ, so each entry of out gets at most one sum and plain stores give equal bits on all
// ranks; a float atomicAdd would flush denormals. An index out of range writes nothing and is counted: telling the host
// at once would make it wait for the device.
#include "collectives.cuh"
#include "elements.cuh"
#include "kernels.h"

namespace distopt::cuda {
namespace {

constexpr int kThreads = 256;

__device__ int32_t index_errors;  // since the last look; one per device, 0 when the module is loaded

template <class Out, class Value>
__device__ inline Out converted(Value value) {
  if constexpr (sizeof(Value) == 2) {
    return static_cast<Out>(widen(value));
  } else {
    return static_cast<Out>(value);
  }
}

template <class Out, class Value>
__global__ void __launch_bounds__(kThreads)
    scatter_add_kernel(Out* out, int64_t numel, const int32_t* indices, const Value* values, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int32_t at = indices[i];
  if (static_cast<uint32_t>(at) >= numel) {  // as unsigned, a negative index is beyond every numel < 2^31
    atomicAdd(&index_errors, 1);
    return;
  }
  out[at] += converted<Out>(values[i]);
}

__global__ void take_index_errors_kernel(int32_t* count) { *count = atomicExch(&index_errors, 0); }

template <class Out>
cudaError_t into(Out* out, int64_t numel, const int32_t* indices, DType value_dtype, const void* values, int64_t count,
                 cudaStream_t stream) {
  Launcher launch{stream};
  const int64_t blocks = ceil_div(count, kThreads);
  const auto add = [&](const auto* typed) {
    using Value = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    launch(scatter_add_kernel<Out, Value>, blocks, kThreads, out, numel, indices, typed, count);
    return launch.error;
  };
  switch (value_dtype) {
    case DType::kFloat32:
      return add(static_cast<const float*>(values));
    case DType::kBFloat16:
      return add(static_cast<const BFloat16*>(values));
    case DType::kFloat16:
      return add(static_cast<const Float16*>(values));
    case DType::kFloat64:
      if constexpr (sizeof(Out) == 8) return add(static_cast<const double*>(values));
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t scatter_add(DType out_dtype, void* out, int64_t numel, const int32_t* indices, DType value_dtype,
                        const void* values, int64_t count, cudaStream_t stream) {
  switch (out_dtype) {
    case DType::kFloat32:
      return into(static_cast<float*>(out), numel, indices, value_dtype, values, count, stream);
    case DType::kFloat64:
      return into(static_cast<double*>(out), numel, indices, value_dtype, values, count, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t take_index_errors(int32_t* count, cudaStream_t stream) {
  Launcher launch{stream};
  launch(take_index_errors_kernel, 1, 1, count);
  return launch.error;
}

}  // namespace distopt::cuda
