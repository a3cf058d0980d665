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

// Above this density candidates would fill a large part of the memory of v: find the k-th key first, then collect.
constexpr int64_t kManyFraction = 32;
constexpr int64_t kAlwaysCollect = 1 << 14;

// Few of many: the pass that updates also collects.
void select_by_candidates(const Job& job, int64_t n, int64_t k, int32_t* indices) {
  // 1. Room for three times k lets the bound miss by that much before a cut is needed.
  const int64_t capacity = std::min(n, 3 * k + 8192) + kBlock;
  const int64_t samples = sample_size(n, k);
  Workspace& workspace = Workspace::of_this_thread();
  workspace.reserve(std::max(capacity, samples));
  // 2. A bound from a sample of the new v, 3. the fused pass.
  Candidates c{workspace.index.get(), workspace.key.get(), capacity, k, kAcceptAll};
  if (samples) {
    sample_keys(job, n, c.key, samples);
    c.bound = bound_from_sample(c.key, samples, n, k);
  }
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

template <class S>
Threshold threshold_of(const S* v, int64_t n, int64_t k) {
  return radix_threshold([v](int64_t i) { return key_of(load(v + i)); }, n, k);
}

Threshold threshold_of_state(const Job& job, int64_t n, int64_t k) {
  switch (job.state_dtype) {
    case DType::kFloat32:
      return threshold_of(static_cast<const float*>(job.v), n, k);
    case DType::kBFloat16:
      return threshold_of(static_cast<const BFloat16*>(job.v), n, k);
    case DType::kFloat16:
      return threshold_of(static_cast<const Float16*>(job.v), n, k);
  }
  return {};
}

// Many of many: the pass that updates keeps only what may be the k-th, a second one collects.
void select_by_threshold(const Job& job, int64_t n, int64_t k, int32_t* indices) {
  // 1. A bracket around the k-th key, from a sample of the new v. It holds a few percent of all keys, or else is given
  // up.
  const int64_t samples = std::max<int64_t>(4096, n / 256);
  const int64_t capacity = n / 8 + kBlock;
  Workspace& workspace = Workspace::of_this_thread();
  workspace.reserve(std::max(capacity, samples));
  Candidates c{workspace.index.get(), workspace.key.get(), capacity, k, kAcceptAll};
  sample_keys(job, n, c.key, samples);
  c.bound = bound_from_sample(c.key, samples, n, k);
  c.ceiling = ceiling_from_sample(c.key, samples, n, k);
  // 2. The fused pass; the k-th key among the candidates, or (rare) among all.
  kernels().pass(job, 0, n, c);
  const int64_t wanted = k - c.num_over_ceiling;
  Threshold least;
  if (wanted >= 1 && wanted <= c.count) {
    least = threshold(c.key, c.count, wanted);
    least.last_tie = c.index[least.last_tie];
  } else {
    least = threshold_of_state(job, n, k);
  }
  // 3. Ties belong to the k largest up to the last one that fits.
  const int64_t so_far = kernels().collect(job, 0, least.last_tie + 1, least.key - 1, indices, k);
  kernels().collect(job, least.last_tie + 1, n, least.key, indices + so_far, k - so_far);
}

void update_only(const Job& job, int64_t n) {
  Candidates none{nullptr, nullptr, kBlock, 0, kAcceptNone};
  if (job.update != Update::kNone) kernels().pass(job, 0, n, none);
}

void select(const Job& job, int64_t n, int64_t k, int32_t* indices) {
  if (k == 0) return update_only(job, n);
  if (n <= kAlwaysCollect || k <= n / kManyFraction) return select_by_candidates(job, n, k, indices);
  select_by_threshold(job, n, k, indices);
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
