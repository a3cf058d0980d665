// The k-th largest key in three passes over its 31 bits, whatever the keys are, and the place of each selected entry.
//
// A pass counts a digit of the keys that share the digits found so far, then walks down from the largest digit to the
// one that holds the rank. Source of the digit-wise search: the radix select of RAFT's select_k.
#pragma once

#include "collectives.cuh"
#include "elements.cuh"

namespace distopt::cuda {

inline constexpr int kPasses = 3;
inline constexpr int kMostBins = 1 << 11;
inline constexpr int kBinsOfAllPasses = (1 << 11) + (1 << 10) + (1 << 10);

DISTOPT_HD constexpr int digit_shift(int pass) { return pass == 0 ? 20 : pass == 1 ? 10 : 0; }
DISTOPT_HD constexpr int digit_bits(int pass) { return pass == 0 ? 11 : 10; }
DISTOPT_HD constexpr int num_bins(int pass) { return 1 << digit_bits(pass); }
DISTOPT_HD constexpr int first_bin(int pass) { return pass == 0 ? 0 : pass == 1 ? 1 << 11 : (1 << 11) + (1 << 10); }

DISTOPT_HD constexpr int32_t digit_of(int32_t key, int pass) {
  return (key >> digit_shift(pass)) & (num_bins(pass) - 1);
}

// Whether the key has the digits found in the passes before. kNoKey never has.
DISTOPT_HD constexpr bool shares_prefix(int32_t key, int32_t prefix, int pass) {
  return key >= 0 && (pass == 0 || key >> (digit_shift(pass) + digit_bits(pass)) == prefix);
}

// After all passes: the k-th key, and how many of the entries equal to it belong to the k largest (the first ones).
// In between: the digits found so far, and the rank among the keys that share them.
struct Found {
  int32_t prefix;
  int32_t rank;
};

struct DigitShared {
  int32_t warp_sums[kWarp];
  Found found;
};

// One step: the digit of `histogram` (of one pass, num_bins) that holds the rank. All threads of the block must call
// it, with the histogram complete; all get the result, and `shared` may be used again at once.
__device__ inline Found find_digit(const int32_t* histogram, int pass, Found before, DigitShared& shared) {
  const int bins = num_bins(pass);
  const int per_thread = static_cast<int>(most(bins / static_cast<int>(blockDim.x), 1));
  const int top = bins - 1 - static_cast<int>(threadIdx.x) * per_thread;  // this thread's largest digit
  int32_t mine = 0;
  for (int i = 0; i < per_thread && top - i >= 0; ++i) mine += histogram[top - i];
  int32_t all;
  const int32_t above = block_exclusive_sum(mine, shared.warp_sums, &all);
  if (above < before.rank && before.rank <= above + mine) {
    int digit = top;
    int32_t rank = before.rank - above;
    while (rank > histogram[digit]) rank -= histogram[digit--];
    shared.found = {before.prefix << digit_bits(pass) | digit, rank};
  }
  __syncthreads();
  return shared.found;  // not written again before the barrier of the next call's sums
}

struct RadixShared {
  int32_t histogram[kMostBins];
  DigitShared digit;
};

// All passes in one block. each(visit) calls visit(key) for the keys of this thread. k in [1, number of keys].
template <class Each>
__device__ inline Found block_threshold(const Each& each, int32_t k, RadixShared& shared) {
  Found found{0, k};
  for (int pass = 0; pass < kPasses; ++pass) {
    for (int i = static_cast<int>(threadIdx.x); i < num_bins(pass); i += static_cast<int>(blockDim.x)) {
      shared.histogram[i] = 0;
    }
    __syncthreads();
    each([&](int32_t key) {
      if (shares_prefix(key, found.prefix, pass)) atomicAdd(&shared.histogram[digit_of(key, pass)], 1);
    });
    __syncthreads();
    found = find_digit(shared.histogram, pass, found, shared.digit);
  }
  return found;
}

// Where in the result an entry goes, given how many before it have larger keys than the threshold and how many equal
// keys; -1 if it is not selected. Entries must be met in ascending index order: ties go to the lowest.
DISTOPT_HD inline int32_t place(int32_t key, Found threshold, int32_t larger_before, int32_t equal_before) {
  const bool selected = key > threshold.prefix || (key == threshold.prefix && equal_before < threshold.rank);
  return selected ? larger_before + (equal_before < threshold.rank ? equal_before : threshold.rank) : -1;
}

// What a warp or a block has met so far.
struct Met {
  int32_t larger = 0;
  int32_t equal = 0;
};

// The place of this lane's entry, in the order of the lanes; all lanes must call it.
__device__ inline int32_t warp_place(int32_t key, Found threshold, Met& met) {
  const unsigned larger = __ballot_sync(kAllLanes, key > threshold.prefix);
  const unsigned equal = __ballot_sync(kAllLanes, key == threshold.prefix);
  const int32_t at =
      place(key, threshold, met.larger + __popc(larger & lanes_before()), met.equal + __popc(equal & lanes_before()));
  met.larger += __popc(larger);
  met.equal += __popc(equal);
  return at;
}

struct PlaceShared {
  int32_t warp_counts[2][kWarp];
};

// The same in the order of the block's threads. All threads must call it, with round 0, 1, 2, ...
__device__ inline int32_t block_place(int32_t key, Found threshold, Met& met, int round, PlaceShared& shared) {
  const unsigned larger = __ballot_sync(kAllLanes, key > threshold.prefix);
  const unsigned equal = __ballot_sync(kAllLanes, key == threshold.prefix);
  int32_t* counts = shared.warp_counts[round & 1];  // the other one may still be read
  if (lane() == 0) counts[warp()] = __popc(larger) | __popc(equal) << 16;
  __syncthreads();
  const int num_warps = static_cast<int>(blockDim.x) / kWarp;
  const int32_t sums = warp_inclusive_sum(lane() < num_warps ? counts[lane()] : 0);  // two sums of at most 1024
  const int32_t all = __shfl_sync(kAllLanes, sums, kWarp - 1);
  const int32_t of_warps = __shfl_sync(kAllLanes, sums, warp() ? warp() - 1 : 0);
  const int32_t before = warp() ? of_warps : 0;
  const int32_t at = place(key, threshold, met.larger + (before & 0xffff) + __popc(larger & lanes_before()),
                           met.equal + (before >> 16) + __popc(equal & lanes_before()));
  met.larger += all & 0xffff;
  met.equal += all >> 16;
  return at;
}

}  // namespace distopt::cuda
