#include <algorithm>
#include <atomic>

#include "counters.h"
#include "kernels.h"
#include "merge.h"
#include "parts.h"
#include "sample.h"
#include "selection.h"
#include "workspace.h"

namespace distopt::cpu {

bool select_by_candidates(const Job& job, int64_t n, int64_t k, const Threads& threads, int32_t* indices) {
  const Parts parts(n, threads);
  // 1. Room for three times k lets the bound miss by that much before a cut is needed.
  const int64_t capacity = std::min(parts.longest(), 3 * k + 8192) + kBlock;
  const int64_t samples = sample_size(n, k);
  Workspace& workspace = Workspace::of_this_thread();
  int32_t* index = workspace.index.reserve(parts.count * capacity);
  int32_t* key = workspace.key.reserve(std::max(parts.count * capacity, samples));
  Candidates c[Parts::kMost];
  std::atomic<bool> finite{true};
  const auto collect = [&](const Job& from, int32_t bound) {
    threads.each(parts.count, [&](int64_t part) {
      c[part] = {index + part * capacity, key + part * capacity, capacity, k, bound};
      if (!kernels().pass(from, parts.begin(part), parts.end(part), c[part])) finite = false;
    });
    return merge(c, parts.count);
  };
  // 2. A bound from a sample of the new v, 3. the fused pass.
  int32_t bound = kAcceptAll;
  if (samples) {
    sample_keys(job, n, key, samples, threads);
    bound = bound_from_sample(key, samples, n, k);
  }
  Candidates all = collect(job, bound);
  if (!finite) return false;
  // 4. Too few passed (rare): read v once more, without a bound. The cuts keep this linear.
  if (all.count < k) {
    count(Counter::kSecondCollections);
    Job again = job;
    again.update = Update::kNone;
    all = collect(again, kAcceptAll);
  }
  // 5. The k best among them.
  if (all.count > k) cut(all);
  std::copy_n(all.index, k, indices);
  return true;
}

}  // namespace distopt::cpu
