#include <algorithm>

#include "counters.h"
#include "kernels.h"
#include "merge.h"
#include "parts.h"
#include "radix.h"
#include "sample.h"
#include "selection.h"
#include "workspace.h"

namespace distopt::cpu {
namespace {

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

// Ties belong to the k largest up to the last one that fits.
int64_t collect(const Job& job, int64_t begin, int64_t end, const Threshold& least, int32_t* indices, int64_t room) {
  const int64_t ties_end = std::clamp(least.last_tie + 1, begin, end);
  const int64_t kept = kernels().collect(job, begin, ties_end, least.key - 1, indices, room);
  return kept + kernels().collect(job, ties_end, end, least.key, indices + kept, room - kept);
}

}  // namespace

void select_by_threshold(const Job& job, int64_t n, int64_t k, const Threads& threads, int32_t* indices) {
  const Parts parts(n, threads);
  // 1. A bracket around the k-th key, from a sample of the new v. It holds a few percent of all keys, or else is given
  // up.
  const int64_t samples = std::min(n, std::max<int64_t>(4096, n / 256));
  const int64_t capacity = parts.longest() / 8 + kBlock;
  Workspace& workspace = Workspace::of_this_thread();
  int32_t* index = workspace.index.reserve(parts.count * capacity);
  int32_t* key = workspace.key.reserve(std::max(parts.count * capacity, samples));
  sample_keys(job, n, key, samples, threads);
  const int32_t bound = bound_from_sample(key, samples, n, k);
  const int32_t ceiling = ceiling_from_sample(key, samples, n, k);
  // 2. The fused pass.
  Candidates c[Parts::kMost];
  threads.each(parts.count, [&](int64_t part) {
    c[part] = {index + part * capacity, key + part * capacity, capacity, 1, bound, ceiling};
    kernels().pass(job, parts.begin(part), parts.end(part), c[part]);
  });
  bool gave_up = false;
  for (int64_t part = 0; part < parts.count; ++part) gave_up |= c[part].bound == kAcceptNone;
  const Candidates all = merge(c, parts.count);
  // 3. The k-th key among the candidates, or (rare) among all.
  const int64_t wanted = k - all.num_over_ceiling;
  if (gave_up || wanted < 1 || wanted > all.count) {
    count(Counter::kSecondCollections);
    collect(job, 0, n, threshold_of_state(job, n, k), indices, k);
    return;
  }
  Threshold least = threshold(all.key, all.count, wanted);
  if (least.last_tie >= 0) least.last_tie = all.index[least.last_tie];
  // 4. How many each part has, so that all can write at once.
  int64_t first[Parts::kMost + 1] = {};
  for (int64_t part = 0, i = 0; part < parts.count; ++part) {
    int64_t kept = c[part].num_over_ceiling;
    for (const int64_t end = i + c[part].count; i < end; ++i) {
      kept += all.key[i] > least.key || (all.key[i] == least.key && all.index[i] <= least.last_tie);
    }
    first[part + 1] = first[part] + kept;
  }
  threads.each(parts.count, [&](int64_t part) {
    collect(job, parts.begin(part), parts.end(part), least, indices + first[part], first[part + 1] - first[part]);
  });
}

}  // namespace distopt::cpu
