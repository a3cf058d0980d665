// Registers the CUDA kernels with torch through its stable ABI: built where torch has CUDA.
//
// Works on the current stream of the tensors' device and waits for nothing; temporary memory comes from torch's caching
// allocator, so that a call can be captured in a CUDA graph. The schemas and the checks with their messages for users
// are in distopt/ops. What is checked again here is what memory safety needs, because torch.ops.distopt can be called
// directly; what only the device knows (a segment table, indices) is checked there and counted, see _device_errors.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <tuple>

#include "cuda/kernels.h"

namespace {

using distopt::cuda::DType;
using distopt::cuda::Sparsify;
using distopt::cuda::Update;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "distopt: ", name,
                      " must be float32, bfloat16 or float16 here; distopt.ops takes the others");
  }
}

void check_flat(const Tensor& t, const char* name, const Tensor& device_of) {
  STD_TORCH_CHECK(t.is_cuda() && t.dim() == 1 && t.is_contiguous(), "distopt: ", name,
                  " must be 1-D and contiguous, on a CUDA device");
  STD_TORCH_CHECK(t.get_device_index() == device_of.get_device_index(), "distopt: ", name,
                  " is on another device than the other tensors");
  STD_TORCH_CHECK(t.numel() <= 0x7fffffff, "distopt: ", name, " must have fewer than 2^31 elements, got ", t.numel());
}

void check_state(const Tensor& state, const char* name, const Tensor& grad) {
  check_flat(state, name, grad);
  STD_TORCH_CHECK(dtype_of(state, name) != DType::kFloat16, "distopt: ", name, " must be float32 or bfloat16");
}

void check_k(int64_t k, int64_t most) {
  STD_TORCH_CHECK(k >= 0 && k <= most, "distopt: k must be in [0, ", most, "], got ", k);
}

cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launched(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "distopt: a CUDA kernel was not launched: ", cudaGetErrorString(error));
}

// Freed on return, while the kernels may still run: the allocator hands the block on in stream order only.
Tensor temporary(const Tensor& like, size_t bytes) {
  return torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

std::tuple<Tensor, Tensor> run(Sparsify job, const Tensor& like, ScalarType value_dtype) {
  const DeviceGuard guard(like.get_device_index());
  Tensor values = torch::stable::new_empty(like, {job.count}, value_dtype);
  Tensor indices = torch::stable::new_empty(like, {job.count}, ScalarType::Int);
  job.values = values.mutable_data_ptr();
  job.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  Tensor workspace =
      temporary(like, distopt::cuda::sparsify_workspace_bytes(job.state_numel, job.num_segments, job.count));
  check_launched(distopt::cuda::sparsify(job, workspace.mutable_data_ptr(), current_stream(like)));
  return {values, indices};
}

// Where the segments are: one, all of the states, unless `segments` says otherwise.
void set_segments(Sparsify& job, const Tensor& segments, const Tensor& grad, int64_t count) {
  STD_TORCH_CHECK(segments.is_cuda() && segments.get_device_index() == grad.get_device_index() &&
                      segments.scalar_type() == ScalarType::Long && segments.dim() == 2 && segments.sizes()[1] == 3 &&
                      segments.is_contiguous(),
                  "distopt: segments must be int64, contiguous, of shape (num_segments, 3), on the device of grad");
  STD_TORCH_CHECK(segments.sizes()[0] > 0 || (job.state_numel == 0 && count == 0),
                  "distopt: without segments the states and the result are empty");
  STD_TORCH_CHECK(segments.sizes()[0] <= 0x7fffffff, "distopt: too many segments");
  check_k(count, job.state_numel);
  job.segments = static_cast<const int64_t*>(segments.const_data_ptr());
  job.num_segments = segments.sizes()[0];
  job.count = count;
}

Sparsify error_feedback(const Tensor& grad, const Tensor& residual) {
  check_flat(grad, "grad", grad);
  check_state(residual, "residual", grad);
  Sparsify job{};
  job.update = Update::kAccumulate;
  job.grad_dtype = dtype_of(grad, "grad");
  job.state_dtype = dtype_of(residual, "residual");
  job.grad = grad.const_data_ptr();
  job.grad_numel = grad.numel();
  job.v = residual.mutable_data_ptr();
  job.state_numel = residual.numel();
  return job;
}

Sparsify momentum_correction(const Tensor& grad, const Tensor& u, const Tensor& v, double momentum, bool nesterov,
                             bool masking) {
  check_flat(grad, "grad", grad);
  check_state(u, "u", grad);
  check_state(v, "v", grad);
  STD_TORCH_CHECK(u.scalar_type() == v.scalar_type(), "distopt: u and v must have one dtype");
  STD_TORCH_CHECK(u.numel() == v.numel(), "distopt: u and v differ in size");
  Sparsify job{};
  job.update = nesterov ? Update::kNesterov : Update::kHeavyBall;
  job.grad_dtype = dtype_of(grad, "grad");
  job.state_dtype = dtype_of(v, "v");
  job.grad = grad.const_data_ptr();
  job.grad_numel = grad.numel();
  job.u = u.mutable_data_ptr();
  job.v = v.mutable_data_ptr();
  job.state_numel = v.numel();
  job.momentum = static_cast<float>(momentum);
  job.masking = masking;
  return job;
}

void set_one_segment(Sparsify& job, int64_t k) {
  STD_TORCH_CHECK(job.state_numel == job.grad_numel, "distopt: states and grad differ in size");
  check_k(k, job.state_numel);
  job.num_segments = 1;
  job.count = k;
}

std::tuple<Tensor, Tensor> topk_abs(const Tensor& x, int64_t k) {
  check_flat(x, "x", x);
  Sparsify job{};
  job.update = Update::kNone;
  job.grad_dtype = DType::kFloat32;  // there is none
  job.state_dtype = dtype_of(x, "x");
  job.grad_numel = x.numel();
  job.v = const_cast<void*>(x.const_data_ptr());  // kNone only reads it
  job.state_numel = x.numel();
  set_one_segment(job, k);
  return run(job, x, x.scalar_type());
}

std::tuple<Tensor, Tensor> ef_sparsify_(const Tensor& grad, const Tensor& residual, int64_t k) {
  Sparsify job = error_feedback(grad, residual);
  set_one_segment(job, k);
  return run(job, residual, ScalarType::Float);
}

std::tuple<Tensor, Tensor> ef_sparsify_segments_(const Tensor& grad, const Tensor& residual, const Tensor& segments,
                                                 int64_t count) {
  Sparsify job = error_feedback(grad, residual);
  set_segments(job, segments, grad, count);
  return run(job, residual, ScalarType::Float);
}

std::tuple<Tensor, Tensor> dgc_sparsify_(const Tensor& grad, const Tensor& u, const Tensor& v, int64_t k,
                                         double momentum, bool nesterov, bool masking) {
  Sparsify job = momentum_correction(grad, u, v, momentum, nesterov, masking);
  set_one_segment(job, k);
  return run(job, v, ScalarType::Float);
}

std::tuple<Tensor, Tensor> dgc_sparsify_segments_(const Tensor& grad, const Tensor& u, const Tensor& v,
                                                  const Tensor& segments, int64_t count, double momentum, bool nesterov,
                                                  bool masking) {
  Sparsify job = momentum_correction(grad, u, v, momentum, nesterov, masking);
  set_segments(job, segments, grad, count);
  return run(job, v, ScalarType::Float);
}

std::tuple<Tensor, Tensor> topk_abs_interleaved(const Tensor& x, int64_t k, int64_t num_owners) {
  check_flat(x, "x", x);
  STD_TORCH_CHECK(num_owners >= 1 && num_owners <= 0x7fffffff, "distopt: num_owners must be at least 1, got ",
                  num_owners);
  check_k(k, x.numel() / num_owners);
  const DType dtype = dtype_of(x, "x");
  const DeviceGuard guard(x.get_device_index());
  Tensor values = torch::stable::new_empty(x, {num_owners, k}, x.scalar_type());
  Tensor indices = torch::stable::new_empty(x, {num_owners, k}, ScalarType::Int);
  Tensor workspace = temporary(x, distopt::cuda::interleaved_workspace_bytes(x.numel(), k, num_owners));
  check_launched(distopt::cuda::topk_abs_interleaved(
      dtype, x.const_data_ptr(), x.numel(), k, num_owners, values.mutable_data_ptr(),
      static_cast<int32_t*>(indices.mutable_data_ptr()), workspace.mutable_data_ptr(), current_stream(x)));
  return {values, indices};
}

void scatter_add_(const Tensor& out, const Tensor& indices, const Tensor& values) {
  check_flat(out, "out", out);
  check_flat(indices, "indices", out);
  check_flat(values, "values", out);
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Int, "distopt: indices must be int32");
  STD_TORCH_CHECK(indices.numel() == values.numel(), "distopt: indices and values differ in size");
  const bool wide = out.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(wide || out.scalar_type() == ScalarType::Float, "distopt: out must be float32 or float64");
  const bool wide_values = values.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(wide || !wide_values, "distopt: values must be floating point and not wider than out");
  const DType value_dtype = wide_values ? DType::kFloat64 : dtype_of(values, "values");
  const DeviceGuard guard(out.get_device_index());
  check_launched(distopt::cuda::scatter_add(wide ? DType::kFloat64 : DType::kFloat32, out.mutable_data_ptr(),
                                            out.numel(), static_cast<const int32_t*>(indices.const_data_ptr()),
                                            value_dtype, values.const_data_ptr(), values.numel(), current_stream(out)));
}

Tensor all_finite(const Tensor& x) {
  check_flat(x, "x", x);
  const DType dtype = x.scalar_type() == ScalarType::Double ? DType::kFloat64 : dtype_of(x, "x");
  const DeviceGuard guard(x.get_device_index());
  Tensor result = torch::stable::new_empty(x, {}, ScalarType::Bool);
  check_launched(distopt::cuda::all_finite(dtype, x.const_data_ptr(), x.numel(),
                                           static_cast<bool*>(result.mutable_data_ptr()), current_stream(x)));
  return result;
}

// Of the device of `like`, since the last call: indices out of range, segment tables that contradict themselves.
Tensor device_errors(const Tensor& like) {
  const DeviceGuard guard(like.get_device_index());
  Tensor errors = torch::stable::new_empty(like, {2}, ScalarType::Int);
  auto* counts = static_cast<int32_t*>(errors.mutable_data_ptr());
  check_launched(distopt::cuda::take_index_errors(counts, current_stream(like)));
  check_launched(distopt::cuda::take_table_errors(counts + 1, current_stream(like)));
  return errors;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(distopt, CUDA, m) {
  m.impl("topk_abs", TORCH_BOX(&topk_abs));
  m.impl("topk_abs_interleaved", TORCH_BOX(&topk_abs_interleaved));
  m.impl("ef_sparsify_", TORCH_BOX(&ef_sparsify_));
  m.impl("ef_sparsify_segments_", TORCH_BOX(&ef_sparsify_segments_));
  m.impl("dgc_sparsify_", TORCH_BOX(&dgc_sparsify_));
  m.impl("dgc_sparsify_segments_", TORCH_BOX(&dgc_sparsify_segments_));
  m.impl("scatter_add_", TORCH_BOX(&scatter_add_));
  m.impl("all_finite", TORCH_BOX(&all_finite));
  m.impl("_device_errors", TORCH_BOX(&device_errors));
}
