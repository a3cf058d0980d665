// Step 4 of sparsify.cu: one block per tile updates the states and collects the candidates. The only pass over all of
// g, u and v where candidates suffice.
#pragma once

#include "collect.cuh"
#include "states.cuh"
#include "workspace.cuh"

namespace distopt::cuda {

template <Update kUpdate, class G, class S>
__global__ void __launch_bounds__(kTileThreads) update_kernel(Sparsify job, Workspace w) {
  CollectShared& shared = block_shared<CollectShared>();
  const int64_t tile = blockIdx.x;
  if (!w.header->valid || w.tile_segment[tile] < 0) return;
  const int32_t slot = w.tile_segment[tile];
  const Segment segment = w.segments[slot];
  const States<kUpdate, G, S> states(job);
  // 1. The tile's elements by their position in the states; those of g are `to_grad` further on.
  const int64_t segment_end = static_cast<int64_t>(segment.state_start) + segment.numel;
  const int64_t begin = first_slot(segment.state_start) + (tile - segment.first_tile) * kTile;
  const int64_t to_grad = static_cast<int64_t>(segment.grad_start) - segment.state_start;
  const bool whole = begin >= segment.state_start && begin + kTile <= segment_end && is_aligned(states.v + begin) &&
                     (!States<kUpdate, G, S>::kVelocity || is_aligned(states.u + begin));
  int32_t key[kSlotsPerThread][kSlot];
  if (whole) {
    // 2a. All loads before the first use.
    [[maybe_unused]] const bool aligned = kUpdate != Update::kNone && is_aligned(states.grad + begin + to_grad);
    [[maybe_unused]] Slot<G> g[kSlotsPerThread];
    [[maybe_unused]] Slot<S> u[kSlotsPerThread];
    Slot<S> v[kSlotsPerThread];
#pragma unroll
    for (int j = 0; j < kSlotsPerThread; ++j) {
      const int64_t at = begin + (j * kTileThreads + static_cast<int>(threadIdx.x)) * kSlot;
      if constexpr (kUpdate != Update::kNone) g[j] = load_slot(states.grad + at + to_grad, aligned);
      if constexpr (States<kUpdate, G, S>::kVelocity) u[j] = load_slot(states.u + at, true);
      v[j] = load_slot(states.v + at, true);
    }
#pragma unroll
    for (int j = 0; j < kSlotsPerThread; ++j) {
      const int64_t at = begin + (j * kTileThreads + static_cast<int>(threadIdx.x)) * kSlot;
#pragma unroll
      for (int c = 0; c < kSlot; ++c) {
        if constexpr (kUpdate != Update::kNone) {
          float u_c = 0, v_c = widen(v[j].at[c]);
          if constexpr (States<kUpdate, G, S>::kVelocity) u_c = widen(u[j].at[c]);
          update<kUpdate>(widen(g[j].at[c]), u_c, v_c, states.momentum);
          if constexpr (States<kUpdate, G, S>::kVelocity) u[j].at[c] = narrow<S>(u_c);
          v[j].at[c] = narrow<S>(v_c);
        }
        key[j][c] = key_of(widen(v[j].at[c]));
      }
      if constexpr (States<kUpdate, G, S>::kVelocity) *reinterpret_cast<Slot<S>*>(states.u + at) = u[j];
      if constexpr (kUpdate != Update::kNone) *reinterpret_cast<Slot<S>*>(states.v + at) = v[j];
    }
  } else {
    // 2b. The ends of a segment, and states that begin anywhere.
#pragma unroll
    for (int j = 0; j < kSlotsPerThread; ++j) {
#pragma unroll
      for (int c = 0; c < kSlot; ++c) {
        const int64_t at = begin + (j * kTileThreads + static_cast<int>(threadIdx.x)) * kSlot + c;
        const bool inside = at >= segment.state_start && at < segment_end;
        key[j][c] = inside ? states.step(at + to_grad, at) : kNoKey;
      }
    }
  }
  // 3. Keep what is above the bound.
  const List list{w.num_candidates + slot, segment.candidate_capacity, w.candidate_index + segment.candidate_start,
                  w.candidate_key + segment.candidate_start};
  collect(key, segment.bound, static_cast<int32_t>(begin - segment.state_start), list, w.tile_offset + tile,
          w.tile_candidates + tile, shared);
}

}  // namespace distopt::cuda
