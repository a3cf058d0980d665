// Steps 5 to 8 of sparsify.cu: the k-th key of each segment, and its k largest entries in order. One warp per tile.
//
// A segment's tiles are read through their candidates where these hold all that is needed, else through all their
// elements: too few passed the bound, too many did, or k is a large part. The same kernels do both, chosen on the
// device.
#pragma once

#include "states.cuh"
#include "workspace.cuh"

namespace distopt::cuda {

// The entries of one tile that may be selected, ascending.
template <class S>
struct TileItems {
  const int32_t* key;    // nullptr: all elements
  const int32_t* index;  // in the segment
  const S* v;
  int32_t first;  // index of v[0] in the segment
  int32_t count;

  __device__ int32_t key_at(int32_t i) const { return key ? key[i] : key_of(widen(v[i])); }
  __device__ int32_t index_at(int32_t i) const { return key ? index[i] : first + i; }
};

template <class S>
__device__ inline TileItems<S> items_of(const Workspace& w, const Segment& segment, int32_t slot, int32_t tile,
                                        const S* v) {
  const int32_t total = w.num_candidates[slot];
  if (total >= segment.k && total <= segment.candidate_capacity) {
    const int32_t at = segment.candidate_start + w.tile_offset[tile];
    return {w.candidate_key + at, w.candidate_index + at, nullptr, 0, w.tile_candidates[tile]};
  }
  const int64_t tile_begin = first_slot(segment.state_start) + static_cast<int64_t>(tile - segment.first_tile) * kTile;
  const int64_t begin = most(tile_begin, segment.state_start);
  const int64_t end = least(tile_begin + kTile, static_cast<int64_t>(segment.state_start) + segment.numel);
  return {nullptr, nullptr, v + begin, static_cast<int32_t>(begin - segment.state_start),
          static_cast<int32_t>(most(end - begin, 0))};
}

// visit(i, key) for the items in order, all lanes together; lanes without an item get kNoKey.
template <class S, class Visit>
__device__ inline void warp_each(const TileItems<S>& items, const Visit& visit) {
  constexpr int kAhead = 8;  // loads in flight
  for (int32_t first = 0; first < items.count; first += kAhead * kWarp) {
    int32_t key[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int32_t i = first + a * kWarp + lane();
      key[a] = i < items.count ? items.key_at(i) : kNoKey;
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (first + a * kWarp < items.count) visit(first + a * kWarp + lane(), key[a]);
    }
  }
}

// Cuts the tiles into one contiguous range per block, and these where segments meet: visit(segment, slot, first tile,
// behind the last tile), all threads of the block together.
template <class Visit>
__device__ inline void each_segment(const Workspace& w, const Visit& visit) {
  if (!w.header->valid) return;
  const int64_t per_block = ceil_div(w.limits.tiles, gridDim.x);
  const int64_t end = least((blockIdx.x + 1) * per_block, w.limits.tiles);
  for (int64_t tile = blockIdx.x * per_block; tile < end;) {
    const int32_t slot = w.tile_segment[tile];
    if (slot < 0) return;
    const Segment segment = w.segments[slot];
    const int64_t stop = least(end, static_cast<int64_t>(segment.first_tile) + segment.num_tiles);
    if (segment.k > 0) visit(segment, slot, static_cast<int32_t>(tile), static_cast<int32_t>(stop));
    tile = stop;
  }
}

// What pass `pass` found. Each block works it out for itself from the histogram, which is complete since the launch
// before; the block of the segment's first tile writes it down for the next launch.
__device__ inline Found resolve(const Workspace& w, const Segment& segment, int32_t slot, int pass, int32_t tile,
                                DigitShared& shared) {
  const Found before = pass == 0 ? Found{0, segment.k} : w.found[slot * kPasses + pass - 1];
  const int32_t* histogram = w.histograms + static_cast<int64_t>(slot) * kBinsOfAllPasses + first_bin(pass);
  const Found found = find_digit(histogram, pass, before, shared);
  if (tile == segment.first_tile && threadIdx.x == 0) w.found[slot * kPasses + pass] = found;
  return found;
}

// 5. Counts one digit of the keys.
template <class S>
__global__ void __launch_bounds__(kTileThreads) histogram_kernel(const S* v, Workspace w, int pass) {
  RadixShared& shared = block_shared<RadixShared>();
  each_segment(w, [&](const Segment& segment, int32_t slot, int32_t begin, int32_t end) {
    for (int i = threadIdx.x; i < num_bins(pass); i += blockDim.x) shared.histogram[i] = 0;
    const int32_t prefix = pass == 0 ? 0 : resolve(w, segment, slot, pass - 1, begin, shared.digit).prefix;
    __syncthreads();
    for (int32_t tile = begin + warp(); tile < end; tile += kTileWarps) {
      warp_each(items_of(w, segment, slot, tile, v), [&](int32_t, int32_t key) {
        if (shares_prefix(key, prefix, pass)) atomicAdd(&shared.histogram[digit_of(key, pass)], 1);
      });
    }
    __syncthreads();
    int32_t* global = w.histograms + static_cast<int64_t>(slot) * kBinsOfAllPasses + first_bin(pass);
    for (int i = threadIdx.x; i < num_bins(pass); i += blockDim.x) {
      if (shared.histogram[i]) atomicAdd(&global[i], shared.histogram[i]);  // who empties a bin next is this thread
    }
  });
}

// 6. Counts, per tile, what is larger than the k-th key and what equals it.
template <class S>
__global__ void __launch_bounds__(kTileThreads) count_kernel(const S* v, Workspace w) {
  DigitShared& shared = block_shared<DigitShared>();
  each_segment(w, [&](const Segment& segment, int32_t slot, int32_t begin, int32_t end) {
    const Found threshold = resolve(w, segment, slot, kPasses - 1, begin, shared);
    for (int32_t tile = begin + warp(); tile < end; tile += kTileWarps) {
      uint64_t larger = 0, equal = 0;
      warp_each(items_of(w, segment, slot, tile, v), [&](int32_t, int32_t key) {
        larger += __popc(__ballot_sync(kAllLanes, key > threshold.prefix));
        equal += __popc(__ballot_sync(kAllLanes, key == threshold.prefix));
      });
      if (lane() == 0) w.tile_counts[tile] = larger | equal << 32;
    }
  });
}

struct ScanShared {
  unsigned long long warp_sums[kWarp];
};

// 7. Turns the counts of each segment's tiles into sums over the tiles before. One block per large segment.
inline constexpr int kTilesPerThread = 4;

__global__ void __launch_bounds__(kSegmentThreads) scan_kernel(Workspace w) {
  ScanShared& shared = block_shared<ScanShared>();
  if (static_cast<int32_t>(blockIdx.x) >= w.header->num_large) return;
  const Segment segment = w.segments[blockIdx.x];
  if (segment.k == 0) return;
  unsigned long long before = 0;
  for (int32_t first = 0; first < segment.num_tiles; first += kSegmentThreads * kTilesPerThread) {
    const int32_t begin = first + static_cast<int32_t>(threadIdx.x) * kTilesPerThread;
    uint64_t* counts = w.tile_counts + segment.first_tile + begin;
    unsigned long long count[kTilesPerThread], mine = 0, all;
#pragma unroll
    for (int i = 0; i < kTilesPerThread; ++i) {
      count[i] = begin + i < segment.num_tiles ? counts[i] : 0;
      mine += count[i];
    }
    unsigned long long so_far = before + block_exclusive_sum(mine, shared.warp_sums, &all);
#pragma unroll
    for (int i = 0; i < kTilesPerThread; ++i) {
      if (begin + i < segment.num_tiles) counts[i] = so_far;
      so_far += count[i];
    }
    before += all;
    __syncthreads();
  }
}

// 8. Writes the selected entries to their places and takes them out.
template <Update kUpdate, class S>
__global__ void __launch_bounds__(kTileThreads) take_kernel(Sparsify job, Workspace w) {
  const Taker<kUpdate, S> taker(job);
  each_segment(w, [&](const Segment& segment, int32_t slot, int32_t begin, int32_t end) {
    const Found threshold = w.found[slot * kPasses + kPasses - 1];
    for (int32_t tile = begin + warp(); tile < end; tile += kTileWarps) {
      const uint64_t before = w.tile_counts[tile];
      Met met{static_cast<int32_t>(before & 0xffffffffu), static_cast<int32_t>(before >> 32)};
      const TileItems<S> items = items_of(w, segment, slot, tile, static_cast<const S*>(job.v));
      warp_each(items, [&](int32_t i, int32_t key) {
        const int32_t at = warp_place(key, threshold, met);
        if (at < 0) return;
        const int64_t index = items.index_at(i);
        taker.take(segment.out_start + at, segment.grad_start + index, segment.state_start + index);
      });
    }
  });
}

}  // namespace distopt::cuda
