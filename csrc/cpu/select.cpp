#include "select.h"

#include <algorithm>

#include "counters.h"
#include "kernels.h"
#include "radix.h"

namespace distopt::cpu {
namespace {

// Up to here the keys stay in the first-level cache and counting them 20 times beats three histograms.
constexpr int64_t kFew = 4096;

// Halves the range of the k-th key by counting.
Threshold threshold_of_few(const int32_t* keys, int64_t n, int64_t k) {
  const auto count_above = kernels().count_above;
  int32_t low = keys[0], high = keys[0];
  for (int64_t i = 1; i < n; ++i) {
    low = std::min(low, keys[i]);
    high = std::max(high, keys[i]);
  }
  // More than k, or exactly k with low = min - 1, are above low; fewer than k are above high.
  int64_t num_above_high = 0;
  for (--low; high - low > 1;) {
    const int32_t middle = low + (high - low) / 2;
    const int64_t above = count_above(keys, n, middle);
    if (above == k) return {middle, -1};
    if (above > k) {
      low = middle;
    } else {
      high = middle;
      num_above_high = above;
    }
  }
  int64_t position = -1;
  for (int64_t ties = k - num_above_high; ties > 0;) ties -= keys[++position] == high;
  return {high, position};
}

}  // namespace

Threshold threshold(const int32_t* keys, int64_t n, int64_t k) {
  if (n <= kFew) return threshold_of_few(keys, n, k);
  return radix_threshold([keys](int64_t i) { return keys[i]; }, n, k);
}

void cut(Candidates& c) {
  const Threshold least = threshold(c.key, c.count, c.k);
  int64_t kept = 0;
  for (int64_t i = 0; i < c.count; ++i) {
    const int32_t key = c.key[i];
    c.index[kept] = c.index[i];
    c.key[kept] = key;
    kept += key > least.key || (key == least.key && i <= least.last_tie);
  }
  c.count = kept;
  c.bound = least.key;
}

void make_room(Candidates& c) {
  count(Counter::kFullBuffers);
  if (c.ceiling == kNoCeiling) return cut(c);
  if (c.bound + 1 == c.ceiling) {
    c.num_dropped += c.count;
  } else {
    c.bound = kAcceptNone;
  }
  c.count = 0;
}

}  // namespace distopt::cpu
