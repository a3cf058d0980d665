// Appends the elements of a tile whose keys are above a bound to a list: those of one tile together and ascending.
#pragma once

#include "collectives.cuh"
#include "elements.cuh"

namespace distopt::cuda {

// Where the candidates of a tile go.
struct List {
  int32_t* total;  // entries that all tiles wanted to append, also those that did not fit
  int32_t capacity;
  int32_t* index;
  int32_t* key;
};

struct CollectShared {
  int32_t before[kWarp];  // candidates before slot j of warp w, at [j * kTileWarps + w]
  int32_t offset;
  int32_t count;
};

// The keys of this thread: slot j holds elements (j * kTileThreads + threadIdx.x) * kSlot onwards of the tile, the
// first of which has index `first`. All threads of the block must call it. Writes where the tile's entries begin in the
// list and how many there are. They are left out when the list is full, which *list.total tells later.
__device__ inline void collect(const int32_t (&key)[kSlotsPerThread][kSlot], int32_t bound, int32_t first,
                               const List& list, int32_t* tile_offset, int32_t* tile_count, CollectShared& shared) {
  // 1. Count, in the order of the elements: by slot, then thread, then element.
  int32_t before[kSlotsPerThread];
#pragma unroll
  for (int j = 0; j < kSlotsPerThread; ++j) {
    int32_t mine = 0;
#pragma unroll
    for (int c = 0; c < kSlot; ++c) mine += key[j][c] > bound;
    int32_t inclusive = 0;
    if (__ballot_sync(kAllLanes, mine > 0)) inclusive = warp_inclusive_sum(mine);  // most often none has any
    before[j] = inclusive - mine;
    if (lane() == kWarp - 1) shared.before[j * kTileWarps + warp()] = inclusive;
  }
  __syncthreads();
  // 2. One warp adds up and takes a place in the list for all of them.
  if (warp() == 0) {
    const bool used = lane() < kSlotsPerThread * kTileWarps;
    const int32_t mine = used ? shared.before[lane()] : 0;
    const int32_t inclusive = warp_inclusive_sum(mine);
    if (used) shared.before[lane()] = inclusive - mine;
    if (lane() == kWarp - 1) {
      shared.count = inclusive;
      shared.offset = inclusive ? atomicAdd(list.total, inclusive) : 0;
      *tile_offset = shared.offset;
      *tile_count = inclusive;
    }
  }
  __syncthreads();
  // 3. Write.
  if (shared.count == 0 || shared.offset + shared.count > list.capacity) return;
#pragma unroll
  for (int j = 0; j < kSlotsPerThread; ++j) {
    int32_t at = shared.offset + shared.before[j * kTileWarps + warp()] + before[j];
#pragma unroll
    for (int c = 0; c < kSlot; ++c) {
      if (key[j][c] > bound) {
        list.index[at] = first + (j * kTileThreads + static_cast<int>(threadIdx.x)) * kSlot + c;
        list.key[at++] = key[j][c];
      }
    }
  }
}

}  // namespace distopt::cuda
