// Registers the CPU kernels with torch through its stable ABI: one build serves every torch >= 2.10.
//
// The schemas, the checks with their messages for users, and the kernels for other devices are in distopt/ops. What is
// checked again here is what memory safety needs, because torch.ops.distopt can be called directly.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/counters.h"
#include "cpu/dense.h"
#include "cpu/interleaved.h"
#include "cpu/kernels.h"
#include "cpu/scatter.h"
#include "cpu/segments.h"
#include "cpu/sparsify.h"
#include "cpu/threads.h"

namespace {

using distopt::cpu::BFloat16;
using distopt::cpu::DType;
using distopt::cpu::Float16;
using distopt::cpu::Job;
using distopt::cpu::Segment;
using distopt::cpu::Threads;
using distopt::cpu::Update;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

void check_contiguous(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 1 && t.is_contiguous(), "distopt: ", name,
                  " must be 1-D and contiguous, on the CPU");
}

// What positions are counted of, in int32.
void check_flat(const Tensor& t, const char* name) {
  check_contiguous(t, name);
  STD_TORCH_CHECK(t.numel() <= 0x7fffffff, "distopt: ", name, " must have fewer than 2^31 elements, got ", t.numel());
}

void check_state(const Tensor& state, const char* name) {
  check_flat(state, name);
  STD_TORCH_CHECK(dtype_of(state, name) != DType::kFloat16, "distopt: ", name, " must be float32 or bfloat16");
}

void check_same_size(const Tensor& state, const char* name, const Tensor& grad, int64_t k) {
  STD_TORCH_CHECK(state.numel() == grad.numel(), "distopt: ", name, " and grad differ in size");
  STD_TORCH_CHECK(k >= 0 && k <= state.numel(), "distopt: k must be in [0, ", state.numel(), "], got ", k);
}

// The threads of torch (torch.set_num_threads). Inside a parallel region of torch they are the calling thread alone.
Threads threads() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t num_tasks, Threads::Task task, void* context) {
            torch::stable::parallel_for(0, num_tasks, 1, [=](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) task(context, i);
            });
          }};
}

// What a Job says is only read: kNone reads v, all but the take operations read grad.
void* only_read(const Tensor& t) { return const_cast<void*>(t.const_data_ptr()); }

Job topk_job(const Tensor& x) {
  const DType dtype = dtype_of(x, "x");
  return {Update::kNone, dtype, dtype, nullptr, nullptr, only_read(x), 0.0f};
}

Job ef_job(const Tensor& grad, const Tensor& residual) {
  check_flat(grad, "grad");
  check_state(residual, "residual");
  return {Update::kAccumulate,
          dtype_of(grad, "grad"),
          dtype_of(residual, "residual"),
          only_read(grad),
          nullptr,
          residual.mutable_data_ptr(),
          0.0f};
}

Job dgc_job(const Tensor& grad, const Tensor& u, const Tensor& v, double momentum, bool nesterov) {
  check_flat(grad, "grad");
  check_state(u, "u");
  check_state(v, "v");
  STD_TORCH_CHECK(u.scalar_type() == v.scalar_type(), "distopt: u and v must have one dtype");
  STD_TORCH_CHECK(u.numel() == v.numel(), "distopt: u and v differ in size");
  return {nesterov ? Update::kNesterov : Update::kHeavyBall,
          dtype_of(grad, "grad"),
          dtype_of(v, "v"),
          only_read(grad),
          u.mutable_data_ptr(),
          v.mutable_data_ptr(),
          static_cast<float>(momentum)};
}

std::tuple<Tensor, Tensor> run(const Job& job, const Tensor& like, int64_t k, bool masking, ScalarType value_dtype) {
  Tensor values = torch::stable::new_empty(like, {k}, value_dtype);
  Tensor indices = torch::stable::new_empty(like, {k}, ScalarType::Int);
  distopt::cpu::sparsify(job, like.numel(), k, masking, threads(), values.mutable_data_ptr(),
                         static_cast<int32_t*>(indices.mutable_data_ptr()));
  return {values, indices};
}

Job taking(Job job, const Tensor& grad) {
  job.grad = grad.mutable_data_ptr();
  job.take = true;
  return job;
}

struct Taken {
  Tensor values;
  Tensor indices;
  int64_t bad;  // the row that is not finite, -1 if none

  std::tuple<Tensor, Tensor> selection() const { return {values, indices}; }
  std::tuple<Tensor, Tensor, Tensor> with_bad() const {
    Tensor row = torch::stable::new_empty(values, {}, ScalarType::Long);
    *static_cast<int64_t*>(row.mutable_data_ptr()) = bad;
    return {values, indices, row};
  }
};

Taken run_segments(const Job& job, const Tensor& grad, const Tensor& state, const Tensor& segments, int64_t count,
                   bool masking) {
  STD_TORCH_CHECK(segments.is_cpu() && segments.dim() == 2 && segments.size(1) == 3 && segments.is_contiguous() &&
                      segments.scalar_type() == ScalarType::Long,
                  "distopt: segments must be int64 of shape (num_segments, 3), contiguous, on the CPU");
  const auto* rows = static_cast<const Segment*>(segments.const_data_ptr());
  const auto problem = distopt::cpu::check(rows, segments.size(0), grad.numel(), state.numel(), count);
  STD_TORCH_CHECK(problem.rule == nullptr, "distopt: ", problem.rule, problem.row < 0 ? "" : "; row ",
                  problem.row < 0 ? "" : std::to_string(problem.row));
  Tensor values = torch::stable::new_empty(state, {count}, ScalarType::Float);
  Tensor indices = torch::stable::new_empty(state, {count}, ScalarType::Int);
  const int64_t row = distopt::cpu::sparsify_segments(job, rows, segments.size(0), masking, threads(),
                                                      static_cast<float*>(values.mutable_data_ptr()),
                                                      static_cast<int32_t*>(indices.mutable_data_ptr()));
  return {values, indices, row};
}

std::tuple<Tensor, Tensor> topk_abs(const Tensor& x, int64_t k) {
  check_flat(x, "x");
  STD_TORCH_CHECK(k >= 0 && k <= x.numel(), "distopt: k must be in [0, ", x.numel(), "], got ", k);
  return run(topk_job(x), x, k, false, x.scalar_type());
}

std::tuple<Tensor, Tensor> topk_abs_interleaved(const Tensor& x, int64_t k, int64_t num_owners) {
  check_flat(x, "x");
  STD_TORCH_CHECK(num_owners >= 1, "distopt: num_owners must be at least 1, got ", num_owners);
  STD_TORCH_CHECK(k >= 0 && k <= x.numel() / num_owners, "distopt: k must be in [0, ", x.numel() / num_owners,
                  "], got ", k);
  const DType dtype = dtype_of(x, "x");
  Tensor values = torch::stable::new_empty(x, {num_owners, k}, x.scalar_type());
  Tensor indices = torch::stable::new_empty(x, {num_owners, k}, ScalarType::Int);
  distopt::cpu::topk_interleaved(x.const_data_ptr(), dtype, x.numel(), k, num_owners, values.mutable_data_ptr(),
                                 static_cast<int32_t*>(indices.mutable_data_ptr()));
  return {values, indices};
}

std::tuple<Tensor, Tensor> ef_sparsify_(const Tensor& grad, const Tensor& residual, int64_t k) {
  const Job job = ef_job(grad, residual);
  check_same_size(residual, "residual", grad, k);
  return run(job, residual, k, false, ScalarType::Float);
}

std::tuple<Tensor, Tensor> dgc_sparsify_(const Tensor& grad, const Tensor& u, const Tensor& v, int64_t k,
                                         double momentum, bool nesterov, bool masking) {
  const Job job = dgc_job(grad, u, v, momentum, nesterov);
  check_same_size(v, "v", grad, k);
  return run(job, v, k, masking, ScalarType::Float);
}

std::tuple<Tensor, Tensor> ef_sparsify_segments_(const Tensor& grad, const Tensor& residual, const Tensor& segments,
                                                 int64_t count) {
  return run_segments(ef_job(grad, residual), grad, residual, segments, count, false).selection();
}

std::tuple<Tensor, Tensor> dgc_sparsify_segments_(const Tensor& grad, const Tensor& u, const Tensor& v,
                                                  const Tensor& segments, int64_t count, double momentum, bool nesterov,
                                                  bool masking) {
  return run_segments(dgc_job(grad, u, v, momentum, nesterov), grad, v, segments, count, masking).selection();
}

std::tuple<Tensor, Tensor, Tensor> ef_take_segments_(const Tensor& grad, const Tensor& residual, const Tensor& segments,
                                                     int64_t count) {
  return run_segments(taking(ef_job(grad, residual), grad), grad, residual, segments, count, false).with_bad();
}

std::tuple<Tensor, Tensor, Tensor> dgc_take_segments_(const Tensor& grad, const Tensor& u, const Tensor& v,
                                                      const Tensor& segments, int64_t count, double momentum,
                                                      bool nesterov, bool masking) {
  const Job job = taking(dgc_job(grad, u, v, momentum, nesterov), grad);
  return run_segments(job, grad, v, segments, count, masking).with_bad();
}

template <class Out>
void scatter_add_into(Out* out, const int32_t* indices, const Tensor& values) {
  using distopt::cpu::scatter_add;
  const void* data = values.const_data_ptr();
  const int64_t count = values.numel();
  switch (values.scalar_type()) {
    case ScalarType::Float:
      return scatter_add(out, indices, static_cast<const float*>(data), count);
    case ScalarType::BFloat16:
      return scatter_add(out, indices, static_cast<const BFloat16*>(data), count);
    case ScalarType::Half:
      return scatter_add(out, indices, static_cast<const Float16*>(data), count);
    default:
      STD_TORCH_CHECK(values.scalar_type() == ScalarType::Double && sizeof(Out) == 8,
                      "distopt: values must be floating point and not wider than out");
      return scatter_add(out, indices, static_cast<const double*>(data), count);
  }
}

void scatter_add_(const Tensor& out, const Tensor& indices, const Tensor& values) {
  check_flat(out, "out");
  check_flat(indices, "indices");
  check_flat(values, "values");
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Int, "distopt: indices must be int32");
  STD_TORCH_CHECK(indices.numel() == values.numel(), "distopt: indices and values differ in size");
  const auto* at = static_cast<const int32_t*>(indices.const_data_ptr());
  const int64_t bad = distopt::cpu::first_out_of_range(at, indices.numel(), out.numel());
  STD_TORCH_CHECK(bad < 0, "distopt: indices[", bad, "] = ", at[bad < 0 ? 0 : bad], " is not in [0, ", out.numel(),
                  ")");
  if (out.scalar_type() == ScalarType::Float) {
    scatter_add_into(static_cast<float*>(out.mutable_data_ptr()), at, values);
  } else {
    STD_TORCH_CHECK(out.scalar_type() == ScalarType::Double, "distopt: out must be float32 or float64");
    scatter_add_into(static_cast<double*>(out.mutable_data_ptr()), at, values);
  }
}

bool finite(const Tensor& x) {
  const auto& kernels = distopt::cpu::kernels();
  const void* data = x.const_data_ptr();
  if (x.scalar_type() == ScalarType::Double) return kernels.finite64(static_cast<const uint64_t*>(data), x.numel());
  switch (dtype_of(x, "x")) {
    case DType::kFloat32:
      return kernels.finite32(static_cast<const uint32_t*>(data), x.numel());
    case DType::kBFloat16:
      return kernels.finite16(static_cast<const uint16_t*>(data), x.numel(), 0x7f80);
    default:
      return kernels.finite16(static_cast<const uint16_t*>(data), x.numel(), 0x7c00);
  }
}

// A tensor of one bool, so that the op has a fake kernel; distopt.ops.all_finite makes a Python bool of it.
Tensor all_finite(const Tensor& x) {
  check_contiguous(x, "x");
  Tensor result = torch::stable::new_empty(x, {}, ScalarType::Bool);
  *static_cast<bool*>(result.mutable_data_ptr()) = finite(x);
  return result;
}

float* check_float32(const Tensor& t, const char* name) {
  check_contiguous(t, name);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "distopt: ", name, " must be float32");
  return static_cast<float*>(t.mutable_data_ptr());
}

// Whether the entries fill one stretch of memory, in whatever order.
bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> steps;  // stride, size
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) > 1) steps.emplace_back(t.stride(i), t.size(i));
  }
  std::sort(steps.begin(), steps.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : steps) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

Tensor scale_(const Tensor& x, double factor) {
  float* data = check_float32(x, "x");
  Tensor result = torch::stable::new_empty(x, {}, ScalarType::Bool);
  *static_cast<bool*>(result.mutable_data_ptr()) =
      distopt::cpu::scale(data, x.numel(), static_cast<float>(factor), threads());
  return result;
}

void momentum_step_(const Tensor& grad, const Tensor& u, double momentum, bool nesterov) {
  float* g = check_float32(grad, "grad");
  float* velocity = check_float32(u, "u");
  STD_TORCH_CHECK(grad.numel() == u.numel(), "distopt: u and grad differ in size");
  distopt::cpu::momentum(g, velocity, grad.numel(), static_cast<float>(momentum), nesterov, threads());
}

void decay_step_(const Tensor& update, std::vector<int64_t> starts, std::vector<Tensor> buffers,
                 std::vector<Tensor> parameters, double rate, double momentum, bool nesterov) {
  float* to = check_float32(update, "update");
  STD_TORCH_CHECK(starts.size() == buffers.size() && starts.size() == parameters.size(),
                  "distopt: starts, buffers and parameters differ in number");
  for (size_t i = 0; i < starts.size(); ++i) {
    check_float32(buffers[i], "a buffer");
    const int64_t n = buffers[i].numel();
    STD_TORCH_CHECK(starts[i] >= 0 && starts[i] <= update.numel() - n, "distopt: parameter ", i,
                    " does not lie inside update");
    STD_TORCH_CHECK(parameters[i].is_cpu() && parameters[i].numel() == n, "distopt: parameter ", i,
                    " and its buffer differ in size or device");
    STD_TORCH_CHECK(is_dense(parameters[i]), "distopt: parameter ", i, " is not dense in memory");
    dtype_of(parameters[i], "a parameter");
  }
  for (size_t i = 0; i < starts.size(); ++i) {
    const distopt::cpu::Decay job{to + starts[i],
                                  static_cast<float*>(buffers[i].mutable_data_ptr()),
                                  parameters[i].const_data_ptr(),
                                  dtype_of(parameters[i], "a parameter"),
                                  static_cast<float>(rate),
                                  static_cast<float>(momentum),
                                  nesterov};
    distopt::cpu::decay(job, buffers[i].numel(), threads());
  }
}

void weighted_sum_(const Tensor& out, std::vector<Tensor> rows, std::vector<double> weights) {
  float* to = check_float32(out, "out");
  STD_TORCH_CHECK(!rows.empty() && rows.size() == weights.size(),
                  "distopt: rows and weights differ in number or are none");
  std::vector<const void*> data;
  std::vector<float> factors;
  for (size_t i = 0; i < rows.size(); ++i) {
    check_contiguous(rows[i], "a row");
    STD_TORCH_CHECK(rows[i].numel() == out.numel(), "distopt: row ", i, " and out differ in size");
    STD_TORCH_CHECK(rows[i].scalar_type() == rows[0].scalar_type(), "distopt: rows 0 and ", i, " differ in dtype");
    data.push_back(rows[i].const_data_ptr());
    factors.push_back(static_cast<float>(weights[i]));
  }
  const distopt::cpu::WeightedSum job{to, data.data(), factors.data(), static_cast<int64_t>(rows.size()),
                                      dtype_of(rows[0], "a row")};
  distopt::cpu::weighted_sum(job, out.numel(), threads());
}

// The path in use after asking for `path` (kernels.h; -1 only asks). Unavailable: no change.
int64_t cpu_path(int64_t path) {
  if (path >= 0) distopt::cpu::set_path(static_cast<int>(path));
  return distopt::cpu::path();
}

// The events that all threads counted so far (counters.h).
int64_t selection_count(int64_t counter) {
  STD_TORCH_CHECK(counter >= 0 && counter < distopt::cpu::kNumCounters, "distopt: no counter ", counter);
  return distopt::cpu::total(static_cast<distopt::cpu::Counter>(counter));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(distopt, CPU, m) {
  m.impl("topk_abs", TORCH_BOX(&topk_abs));
  m.impl("ef_sparsify_", TORCH_BOX(&ef_sparsify_));
  m.impl("dgc_sparsify_", TORCH_BOX(&dgc_sparsify_));
  m.impl("ef_sparsify_segments_", TORCH_BOX(&ef_sparsify_segments_));
  m.impl("dgc_sparsify_segments_", TORCH_BOX(&dgc_sparsify_segments_));
  m.impl("ef_take_segments_", TORCH_BOX(&ef_take_segments_));
  m.impl("dgc_take_segments_", TORCH_BOX(&dgc_take_segments_));
  m.impl("topk_abs_interleaved", TORCH_BOX(&topk_abs_interleaved));
  m.impl("scatter_add_", TORCH_BOX(&scatter_add_));
  m.impl("all_finite", TORCH_BOX(&all_finite));
  m.impl("scale_", TORCH_BOX(&scale_));
  m.impl("momentum_step_", TORCH_BOX(&momentum_step_));
  m.impl("decay_step_", TORCH_BOX(&decay_step_));
  m.impl("weighted_sum_", TORCH_BOX(&weighted_sum_));
}

STABLE_TORCH_LIBRARY_IMPL(distopt, CompositeExplicitAutograd, m) {
  m.impl("_cpu_path", TORCH_BOX(&cpu_path));
  m.impl("_selection_count", TORCH_BOX(&selection_count));
}
