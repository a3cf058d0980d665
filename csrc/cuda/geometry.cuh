// Sizes, positions and limits: the arithmetic that host and device share. Pure functions.
#pragma once

#include <cmath>

#include "portable.cuh"

namespace distopt::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// Shapes of the launches. A test may shrink them, so that few elements make many blocks.
#ifndef DISTOPT_CUDA_SEGMENT_THREADS
#define DISTOPT_CUDA_SEGMENT_THREADS 1024
#define DISTOPT_CUDA_KEYS_PER_THREAD 16
#define DISTOPT_CUDA_TILE_THREADS 256
#endif
inline constexpr int kSegmentThreads = DISTOPT_CUDA_SEGMENT_THREADS;  // of a block that looks at a whole segment
inline constexpr int kKeysPerThread = DISTOPT_CUDA_KEYS_PER_THREAD;   // that it can hold in registers
inline constexpr int kTileThreads = DISTOPT_CUDA_TILE_THREADS;        // of a block that looks at tiles
inline constexpr int kSlot = 4;                                       // elements that a thread moves at once
inline constexpr int kSlotsPerThread = 4;
inline constexpr int kTile = kTileThreads * kSlot * kSlotsPerThread;  // elements of a tile
inline constexpr int kTileWarps = kTileThreads / kWarp;
inline constexpr int64_t kSmall = static_cast<int64_t>(kSegmentThreads) * kKeysPerThread;
static_assert(kSlotsPerThread * kTileWarps <= kWarp, "one warp adds up the counts of a tile");
static_assert(kSegmentThreads <= 1024 && kSegmentThreads % kWarp == 0 && kTileThreads % kWarp == 0, "whole warps");

DISTOPT_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
DISTOPT_HD constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
DISTOPT_HD constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// One block does all of a small segment. The others are cut into tiles.
DISTOPT_HD constexpr bool is_small(int64_t numel) { return numel <= kSmall; }

// Above this part of all elements, candidates would fill much memory: all elements are looked at instead.
DISTOPT_HD constexpr bool is_dense(int64_t numel, int64_t k) { return k > numel / 32; }

// Tiles begin on a whole slot of the states, so that a segment's first one may begin before the segment.
DISTOPT_HD constexpr int64_t first_slot(int64_t state_start) { return state_start / kSlot * kSlot; }

// Enough wherever the segment begins; the last one may be empty.
DISTOPT_HD constexpr int64_t num_tiles(int64_t numel) { return ceil_div(numel + kSlot - 1, kTile); }

// How many keys are drawn for the bound: about 16 of the k largest among them, as many as a block holds at most.
DISTOPT_HD constexpr int64_t sample_size(int64_t numel, int64_t wanted) {
  return least(numel, least(kSmall, most(4096, 16 * (numel / most(wanted, 1)))));
}

// One draw per stretch, at a place in it that no regular pattern of the data follows.
DISTOPT_HD inline int64_t sample_position(int64_t i, int64_t stretch) {
  const uint64_t hash = static_cast<uint32_t>(i) * 2654435761u;  // Knuth's multiplicative hash
  return i * stretch + static_cast<int64_t>((hash * static_cast<uint64_t>(stretch)) >> 32);
}

// The rank in the sample of a key that `wanted` of numel elements reach but for five standard deviations.
DISTOPT_HD inline int64_t bound_rank(int64_t size, int64_t numel, int64_t wanted) {
  const double part = static_cast<double>(wanted) / static_cast<double>(numel);
  const double expected = static_cast<double>(size) * part;
  return static_cast<int64_t>(ceil(expected + 5 * sqrt(expected * (1 - part)))) + 1;
}

// Room for what passes the bound: on average 2.4 times the larger of k and numel / 1024, at most.
DISTOPT_HD constexpr int64_t candidate_capacity(int64_t numel, int64_t wanted) {
  return least(numel, 8 * most(wanted, numel / 1024) + 1024);
}

// Upper limits that the host knows without looking at the segments.
struct Limits {
  int64_t large;       // segments that are not small
  int64_t tiles;       // of them
  int64_t candidates;  // of them
};

inline Limits limits(int64_t state_numel, int64_t num_segments, int64_t count) {
  Limits most_of;
  most_of.large = least(num_segments, state_numel / (kSmall + 1));
  most_of.tiles = most_of.large ? (state_numel + (kSlot - 1) * most_of.large) / kTile + most_of.large : 0;
  most_of.candidates =
      most_of.large ? 8 * (least(count, state_numel / 32) + state_numel / 1024) + 1024 * most_of.large : 0;
  return most_of;
}

}  // namespace distopt::cuda
