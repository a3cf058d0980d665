// Exact selection of the k largest keys from a stream of (index, key) in ascending index order.
//
// Candidates keeps what may still belong to the result. A key enters only if it is above `bound`; when the buffer is
// full, it is cut down to the k best so far and `bound` becomes the smallest of them. An element that comes later and
// ties with it has a higher index and loses, so "strictly above" is exact. Time is linear for every input, also for
// constant or ascending ones, because a cut happens at most once per (capacity - k) entries.
//
// With a ceiling, keys above it are counted, not kept: when k is a large part of all, only the few keys between bound
// and ceiling need to be looked at to find the k-th. Where only one key fits in between, all of them are ties: their
// number says enough, and a full buffer is emptied.
//
// The keys are the bits of |x| (dtypes.h). Source of the digit-wise search: the radix select of RAFT's select_k.
#pragma once

#include <cstdint>

namespace distopt::cpu {

inline constexpr int32_t kAcceptAll = -1;
inline constexpr int32_t kAcceptNone = 0x7fffffff;
inline constexpr int32_t kNoCeiling = 0x7fffffff;

struct Candidates {
  int32_t* index;
  int32_t* key;
  int64_t capacity;
  int64_t k;
  int32_t bound;
  int32_t ceiling = kNoCeiling;
  int64_t count = 0;
  int64_t num_over_ceiling = 0;
  int64_t num_dropped = 0;
};

// Passes append at most this many entries between two looks at the capacity.
inline constexpr int64_t kBlock = 64;

// The k best of the candidates, in place, still in ascending index order; nothing at or below the new bound can still
// belong to the result. Needs count >= k >= 1.
void cut(Candidates& c);

// What a pass does when the buffer is full: cuts, or, with a ceiling, drops ties, or gives up a bracket too wide.
void make_room(Candidates& c);

// Which of n keys are the k largest: those above `key`, and those equal to it up to position `last_tie` (-1: none).
struct Threshold {
  int32_t key;
  int64_t last_tie;

  // All of the k largest are strictly above.
  int32_t bound() const { return last_tie < 0 ? key : key - 1; }
};

// k in [1, n].
Threshold threshold(const int32_t* keys, int64_t n, int64_t k);

}  // namespace distopt::cpu
