#include <algorithm>
#include <atomic>

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

// Calls visit with a function that gives the key of element i of v.
template <class Visit>
auto with_keys(const Job& job, Visit visit) {
  switch (job.state_dtype) {
    case DType::kFloat32:
      return visit([v = static_cast<const float*>(job.v)](int64_t i) { return key_of(load(v + i)); });
    case DType::kBFloat16:
      return visit([v = static_cast<const BFloat16*>(job.v)](int64_t i) { return key_of(load(v + i)); });
    default:
      return visit([v = static_cast<const Float16*>(job.v)](int64_t i) { return key_of(load(v + i)); });
  }
}

Threshold threshold_of_state(const Job& job, int64_t n, int64_t k) {
  return with_keys(job, [=](auto key_at) { return radix_threshold(key_at, n, k); });
}

// The position of the rank-th element from begin on whose key is `key`; it must be there.
int64_t position_of(const Job& job, int64_t begin, int32_t key, int64_t rank) {
  return with_keys(job, [=](auto key_at) {
    int64_t i = begin - 1;
    for (int64_t left = rank; left > 0;) left -= key_at(++i) == key;
    return i;
  });
}

// Ties belong to the k largest up to the last one that fits.
int64_t collect(const Job& job, int64_t begin, int64_t end, const Threshold& least, int32_t* indices, int64_t room) {
  const int64_t ties_end = std::clamp(least.last_tie + 1, begin, end);
  const int64_t kept = kernels().collect(job, begin, ties_end, least.key - 1, indices, room);
  return kept + kernels().collect(job, ties_end, end, least.key, indices + kept, room - kept);
}

// Between bound and ceiling are ties: the first `wanted` of them belong to the result.
void share_ties(const Job& job, const Candidates* c, const Parts& parts, int64_t wanted, Threshold* least,
                int64_t* first) {
  for (int64_t part = 0; part < parts.count; ++part) {
    const int64_t ties = c[part].count + c[part].num_dropped, taken = std::min(ties, wanted);
    const int32_t key = c[part].ceiling;
    least[part] = {key, taken == ties ? parts.end(part) - 1 : position_of(job, parts.begin(part), key, taken)};
    first[part + 1] = first[part] + c[part].num_over_ceiling + taken;
    wanted -= taken;
  }
}

// The wanted-th among the candidates is the k-th of all.
void share(const Candidates* c, const Parts& parts, int64_t wanted, Threshold* least, int64_t* first) {
  const Candidates all = merge(c, parts.count);
  Threshold kth = threshold(all.key, all.count, wanted);
  if (kth.last_tie >= 0) kth.last_tie = all.index[kth.last_tie];
  for (int64_t part = 0, i = 0; part < parts.count; ++part) {
    int64_t taken = c[part].num_over_ceiling;
    for (const int64_t end = i + c[part].count; i < end; ++i) {
      taken += all.key[i] > kth.key || (all.key[i] == kth.key && all.index[i] <= kth.last_tie);
    }
    least[part] = kth;
    first[part + 1] = first[part] + taken;
  }
}

}  // namespace

bool select_by_threshold(const Job& job, int64_t n, int64_t k, const Threads& threads, int32_t* indices) {
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
  std::atomic<bool> finite{true};
  threads.each(parts.count, [&](int64_t part) {
    c[part] = {index + part * capacity, key + part * capacity, capacity, 1, bound, ceiling};
    if (!kernels().pass(job, parts.begin(part), parts.end(part), c[part])) finite = false;
  });
  if (!finite) return false;
  bool gave_up = false;
  int64_t num_over = 0, num_between = 0;
  for (int64_t part = 0; part < parts.count; ++part) {
    gave_up |= c[part].bound == kAcceptNone;
    num_over += c[part].num_over_ceiling;
    num_between += c[part].count + c[part].num_dropped;
  }
  // 3. The k-th key among the candidates, or (rare) among all.
  const int64_t wanted = k - num_over;
  if (gave_up || wanted < 1 || wanted > num_between) {
    count(Counter::kSecondCollections);
    collect(job, 0, n, threshold_of_state(job, n, k), indices, k);
    return true;
  }
  // 4. What each part has to give, so that all can write at once.
  Threshold least[Parts::kMost];
  int64_t first[Parts::kMost + 1] = {};
  if (bound + 1 == ceiling) {
    share_ties(job, c, parts, wanted, least, first);
  } else {
    share(c, parts, wanted, least, first);
  }
  threads.each(parts.count, [&](int64_t part) {
    collect(job, parts.begin(part), parts.end(part), least[part], indices + first[part], first[part + 1] - first[part]);
  });
  return true;
}

}  // namespace distopt::cpu
