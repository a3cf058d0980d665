#include "selection.h"

#include <atomic>

#include "kernels.h"
#include "parts.h"
#include "select.h"

namespace distopt::cpu {
namespace {

constexpr int64_t kSmall = 1 << 14;   // elements: candidates for all of them cost little
constexpr int64_t kNear = 1 << 18;    // elements: v is still in a near cache when its blocks are looked at again
constexpr int64_t kCached = 1 << 22;  // elements: in some cache, if it is few of them
// Above this density candidates would fill a large part of the memory of v: find the k-th key first, then collect.
constexpr int64_t kManyFraction = 32;

bool update_only(const Job& job, int64_t n, const Threads& threads) {
  if (job.update == Update::kNone) return true;
  const Parts parts(n, threads);
  std::atomic<bool> finite{true};
  threads.each(parts.count, [&](int64_t part) {
    Candidates none{nullptr, nullptr, kBlock, 0, kAcceptNone};
    if (!kernels().pass(job, parts.begin(part), parts.end(part), none)) finite = false;
  });
  return finite;
}

}  // namespace

bool select(const Job& job, int64_t n, int64_t k, const Threads& threads, int32_t* indices) {
  if (k == 0) return update_only(job, n, threads);
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  if (n <= kNear ? k <= blocks : n <= kCached && k <= blocks / 4) {
    return select_by_maxima(job, n, k, threads, indices);
  }
  if (n <= kSmall || k <= n / kManyFraction) return select_by_candidates(job, n, k, threads, indices);
  return select_by_threshold(job, n, k, threads, indices);
}

}  // namespace distopt::cpu
