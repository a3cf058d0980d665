#include "sparsify.h"

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "radix.h"
#include "sample.h"
#include "select.h"
#include "workspace.h"

namespace distopt::cpu {
namespace {

// Above this density candidates would fill a large part of the memory of v: select on v itself.
constexpr int64_t kDenseFraction = 16;
constexpr int64_t kAlwaysCollect = 1 << 14;

// Few of many: the pass that updates also collects.
void select_by_candidates(const Job& job, int64_t n, int64_t k, int32_t* indices) {
  // 1. Room for three times k lets the bound miss by that much before a cut is needed.
  const int64_t capacity = std::min(n, 3 * k + 8192) + kBlock;
  const int64_t samples = sample_size(n, k);
  Workspace& workspace = Workspace::of_this_thread();
  workspace.reserve(std::max(capacity, samples));
  // 2. A bound from a sample of the new v, 3. the fused pass.
  const int32_t bound = samples ? sample_bound(job, n, k, workspace.key.get(), samples) : kAcceptAll;
  Candidates c{workspace.index.get(), workspace.key.get(), 0, capacity, k, bound};
  kernels().pass(job, 0, n, c);
  // 4. Too few passed (rare): read v once more, without a bound. The cuts keep this linear.
  if (c.count < k) {
    Job again = job;
    again.update = Update::kNone;
    c.count = 0;
    c.bound = kAcceptAll;
    kernels().pass(again, 0, n, c);
  }
  // 5. The k best among them.
  if (c.count > k) cut(c);
  std::copy_n(c.index, k, indices);
}

// Many of many: find the k-th key on v itself, then collect in a last pass. No workspace.
template <class S>
void select_dense(const S* v, int64_t n, int64_t k, int32_t* indices) {
  int64_t num_above = 0;
  const auto key_at = [v](int64_t i) { return key_of(load(v + i)); };
  const int32_t kth = radix_kth_largest(key_at, n, k, &num_above);
  int64_t ties_left = k - num_above;
  for (int64_t i = 0, kept = 0; kept < k; ++i) {
    const int32_t key = key_at(i);
    const bool tie = key == kth && ties_left > 0;
    ties_left -= tie;
    indices[kept] = static_cast<int32_t>(i);
    kept += key > kth || tie;
  }
}

void update_only(const Job& job, int64_t n) {
  Candidates none{nullptr, nullptr, 0, kBlock, 0, kAcceptNone};
  if (job.update != Update::kNone) kernels().pass(job, 0, n, none);
}

void select(const Job& job, int64_t n, int64_t k, int32_t* indices) {
  if (k == 0) return update_only(job, n);
  if (n <= kAlwaysCollect || k <= n / kDenseFraction) return select_by_candidates(job, n, k, indices);
  update_only(job, n);
  switch (job.state_dtype) {
    case DType::kFloat32:
      return select_dense(static_cast<const float*>(job.v), n, k, indices);
    case DType::kBFloat16:
      return select_dense(static_cast<const BFloat16*>(job.v), n, k, indices);
    case DType::kFloat16:
      return select_dense(static_cast<const Float16*>(job.v), n, k, indices);
  }
}

template <class T>
void gather(const T* v, const int32_t* indices, int64_t k, T* values) {
  for (int64_t i = 0; i < k; ++i) values[i] = v[indices[i]];
}

template <class S>
void take_out(S* v, S* u, const int32_t* indices, int64_t k, float* values) {
  for (int64_t i = 0; i < k; ++i) {
    const int32_t at = indices[i];
    values[i] = load(v + at);
    v[at] = S{};
    if (u) u[at] = S{};
  }
}

}  // namespace

void sparsify(const Job& job, int64_t n, int64_t k, bool masking, void* values, int32_t* indices) {
  select(job, n, k, indices);
  if (job.update == Update::kNone) {
    if (job.state_dtype == DType::kFloat32) {
      gather(static_cast<const uint32_t*>(job.v), indices, k, static_cast<uint32_t*>(values));
    } else {
      gather(static_cast<const uint16_t*>(job.v), indices, k, static_cast<uint16_t*>(values));
    }
    return;
  }
  auto* out = static_cast<float*>(values);
  void* u = masking ? job.u : nullptr;
  if (job.state_dtype == DType::kFloat32) {
    take_out(static_cast<float*>(job.v), static_cast<float*>(u), indices, k, out);
  } else {
    take_out(static_cast<BFloat16*>(job.v), static_cast<BFloat16*>(u), indices, k, out);
  }
}

}  // namespace distopt::cpu
