// Steps 1 to 3 of sparsify.cu: one block per segment reads the table; it finishes a small segment, and prepares the
// tiles of a large one.
#pragma once

#include "states.cuh"
#include "workspace.cuh"

namespace distopt::cuda {

// Tables that contradicted themselves or the sizes since the last look. One per device, 0 when the module is loaded.
static __device__ int32_t table_errors;

enum Column { kNumel, kK, kTiles, kCandidates, kLarge, kNumColumns };

struct SegmentShared {
  unsigned long long before[kNumColumns];
  int32_t contradictions;
  RadixShared radix;
  PlaceShared place;
};

struct Row {
  int64_t start;
  int64_t numel;
  int64_t k;
};

__device__ inline Row row(const Sparsify& job, int64_t s) {
  if (!job.segments) return {0, job.state_numel, job.count};
  return {job.segments[3 * s], job.segments[3 * s + 1], job.segments[3 * s + 2]};
}

__device__ inline bool fits(const Row& r, int64_t grad_numel) {
  return r.start >= 0 && r.start <= grad_numel && r.numel >= 0 && r.numel <= grad_numel - r.start && r.k >= 0 &&
         r.k <= r.numel;
}

// Inside grad, and behind the row before.
__device__ inline bool is_valid(const Sparsify& job, int64_t s) {
  const Row r = row(job, s);
  if (!fits(r, job.grad_numel)) return false;
  if (s == 0) return true;
  const Row previous = row(job, s - 1);
  return fits(previous, job.grad_numel) && previous.start + previous.numel <= r.start;
}

__device__ inline int64_t entry(const Row& r, int column) {
  const bool large = !is_small(r.numel);
  switch (column) {
    case kNumel:
      return r.numel;
    case kK:
      return r.k;
    case kTiles:
      return large ? num_tiles(r.numel) : 0;
    case kCandidates:
      return large && !is_dense(r.numel, r.k) ? candidate_capacity(r.numel, r.k) : 0;
    default:
      return large;
  }
}

// Sums over the rows before s, and whether the rows up to s are valid. Sums mean nothing where they are not.
__device__ inline bool read_table(const Sparsify& job, int64_t s, int64_t (&before)[kNumColumns],
                                  SegmentShared& shared) {
  if (threadIdx.x < kNumColumns) shared.before[threadIdx.x] = 0;
  if (threadIdx.x == 0) shared.contradictions = 0;
  __syncthreads();
  int64_t mine[kNumColumns] = {};
  bool valid = true;
  for (int64_t r = threadIdx.x; r <= s; r += blockDim.x) {
    const bool good = is_valid(job, r);
    valid = valid && good;
    if (!good || r == s) continue;
#pragma unroll
    for (int column = 0; column < kNumColumns; ++column) mine[column] += entry(row(job, r), column);
  }
  if (!valid) atomicAdd(&shared.contradictions, 1);
  if (s > 0) {
#pragma unroll
    for (int column = 0; column < kNumColumns; ++column) {
      const int64_t of_warp = warp_sum(mine[column]);
      if (lane() == 0 && of_warp) atomicAdd(&shared.before[column], static_cast<unsigned long long>(of_warp));
    }
  }
  __syncthreads();
  for (int column = 0; column < kNumColumns; ++column) before[column] = static_cast<int64_t>(shared.before[column]);
  return shared.contradictions == 0;
}

// Draws keys of the new v and takes one of them as the bound, low enough that k entries pass it but for five standard
// deviations.
template <Update kUpdate, class G, class S>
__device__ inline int32_t sampled_bound(const States<kUpdate, G, S>& states, const Segment& segment,
                                        SegmentShared& shared) {
  const int64_t size = sample_size(segment.numel, segment.k);
  const int64_t stretch = segment.numel / size;
  const int64_t wanted = bound_rank(size, segment.numel, segment.k);
  if (wanted >= size) return kAcceptAll;
  int32_t key[kKeysPerThread];
#pragma unroll
  for (int j = 0; j < kKeysPerThread; ++j) {
    const int64_t i = j * kSegmentThreads + static_cast<int>(threadIdx.x);
    const int64_t at = i < size ? sample_position(i, stretch) : 0;
    key[j] = i < size ? states.new_key(segment.grad_start + at, segment.state_start + at) : kNoKey;
  }
  const auto each = [&](auto visit) {
#pragma unroll
    for (int j = 0; j < kKeysPerThread; ++j) visit(key[j]);
  };
  // One below that key, so that keys equal to it pass: they may all be needed when many are equal.
  return block_threshold(each, static_cast<int32_t>(wanted), shared.radix).prefix - 1;
}

// Updates, selects and takes out in one block: the keys stay in registers.
template <Update kUpdate, class G, class S>
__device__ inline void finish_small(const Sparsify& job, const States<kUpdate, G, S>& states, const Row& r,
                                    int64_t state_start, int64_t out_start, SegmentShared& shared) {
  int32_t key[kKeysPerThread];
#pragma unroll
  for (int j = 0; j < kKeysPerThread; ++j) {
    const int64_t i = j * kSegmentThreads + static_cast<int>(threadIdx.x);
    key[j] = i < r.numel ? states.step(r.start + i, state_start + i) : kNoKey;
  }
  if (r.k == 0) return;
  const auto each = [&](auto visit) {
#pragma unroll
    for (int j = 0; j < kKeysPerThread; ++j) visit(key[j]);
  };
  const Found threshold = block_threshold(each, static_cast<int32_t>(r.k), shared.radix);
  const Taker<kUpdate, S> taker(job);
  Met met;
#pragma unroll
  for (int j = 0; j < kKeysPerThread; ++j) {
    const int64_t i = j * kSegmentThreads + static_cast<int>(threadIdx.x);
    if (static_cast<int64_t>(j) * kSegmentThreads < r.numel) {  // the same for all threads
      const int32_t at = block_place(key[j], threshold, met, j, shared.place);
      if (at >= 0) taker.take(out_start + at, r.start + i, state_start + i);
    }
  }
}

template <Update kUpdate, class G, class S>
__global__ void __launch_bounds__(kSegmentThreads) segment_kernel(Sparsify job, Workspace w) {
  SegmentShared& shared = block_shared<SegmentShared>();
  const States<kUpdate, G, S> states(job);
  const int64_t s = blockIdx.x;
  // 1. Where the states, results, tiles and candidates of this segment begin. Nothing is touched that a table which
  // contradicts itself could place outside a tensor; the block of the last row sees them all and says so.
  int64_t before[kNumColumns];
  bool valid = read_table(job, s, before, shared);
  const Row r = row(job, s);
  valid = valid && before[kNumel] + r.numel <= job.state_numel && before[kK] + r.k <= job.count;
  const int64_t slot = before[kLarge];
  if (s == job.num_segments - 1) {
    valid = valid && before[kNumel] + r.numel == job.state_numel && before[kK] + r.k == job.count;
    if (threadIdx.x == 0) {
      *w.header = {valid, static_cast<int32_t>(valid ? slot + entry(r, kLarge) : 0)};
      if (!valid) atomicAdd(&table_errors, 1);
    }
  }
  if (!valid) return;
  if (s == job.num_segments - 1) {
    const int64_t end = before[kTiles] + entry(r, kTiles);
    for (int64_t t = end + threadIdx.x; t < w.limits.tiles; t += blockDim.x) w.tile_segment[t] = -1;
  }
  // 2. Small: all of it.
  if (is_small(r.numel)) return finish_small(job, states, r, before[kNumel], before[kK], shared);
  // 3. Large: its tiles, its counters, and a bound for its candidates.
  Segment segment;
  segment.grad_start = static_cast<int32_t>(r.start);
  segment.state_start = static_cast<int32_t>(before[kNumel]);
  segment.numel = static_cast<int32_t>(r.numel);
  segment.k = static_cast<int32_t>(r.k);
  segment.out_start = static_cast<int32_t>(before[kK]);
  segment.first_tile = static_cast<int32_t>(before[kTiles]);
  segment.num_tiles = static_cast<int32_t>(entry(r, kTiles));
  segment.candidate_start = static_cast<int32_t>(before[kCandidates]);
  segment.candidate_capacity = static_cast<int32_t>(entry(r, kCandidates));
  for (int32_t t = threadIdx.x; t < segment.num_tiles; t += blockDim.x) {
    w.tile_segment[segment.first_tile + t] = static_cast<int32_t>(slot);
  }
  for (int i = threadIdx.x; i < kBinsOfAllPasses; i += blockDim.x) w.histograms[slot * kBinsOfAllPasses + i] = 0;
  const bool looks_at_all = r.k == 0 || segment.candidate_capacity == 0;
  segment.bound = looks_at_all ? kAcceptNone : sampled_bound(states, segment, shared);
  if (threadIdx.x == 0) {
    w.segments[slot] = segment;
    w.num_candidates[slot] = 0;
  }
}

}  // namespace distopt::cuda
