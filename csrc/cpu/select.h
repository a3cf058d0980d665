// Exact selection of the k largest keys from a stream of (index, key) in ascending index order.
//
// Candidates keeps what may still belong to the result. A key enters only if it is above `bound`; when the buffer is
// full, it is cut down to the k best so far and `bound` becomes the smallest of them. An element that comes later and
// ties with it has a higher index and loses, so "strictly above" is exact. Time is linear for every input, also for
// constant or ascending ones, because a cut happens at most once per (capacity - k) entries.
//
// The keys are the bits of |x| (dtypes.h). Source of the digit-wise search: the radix select of RAFT's select_k.
#pragma once

#include <cstdint>

namespace distopt::cpu {

struct Candidates {
  int32_t* index;
  int32_t* key;
  int64_t count;
  int64_t capacity;
  int64_t k;
  int32_t bound;
};

// Passes append at most this many entries between two looks at the capacity.
inline constexpr int64_t kBlock = 64;

inline constexpr int32_t kAcceptAll = -1;
inline constexpr int32_t kAcceptNone = 0x7fffffff;

// The k best of the candidates, in place, still in ascending index order; bound becomes the k-th key. Needs count >= k
// >= 1.
void cut(Candidates& c);

// The k-th largest of n keys, k in [1, n]. *num_above is how many keys are larger than it.
int32_t kth_largest(const int32_t* keys, int64_t n, int64_t k, int64_t* num_above);

}  // namespace distopt::cpu
