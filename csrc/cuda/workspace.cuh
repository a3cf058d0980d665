// The temporary memory of `sparsify`: what its kernels tell each other.
#pragma once

#include "geometry.cuh"
#include "radix.cuh"

namespace distopt::cuda {

// A segment that is cut into tiles, as the kernels after the first see it.
struct Segment {
  int32_t grad_start;
  int32_t state_start;
  int32_t numel;
  int32_t k;
  int32_t out_start;
  int32_t first_tile;
  int32_t num_tiles;
  int32_t candidate_start;
  int32_t candidate_capacity;
  int32_t bound;  // candidates have larger keys
};

struct Header {
  int32_t valid;      // whether the segment table is; else nothing is done
  int32_t num_large;  // segments that are cut into tiles
};

// Each array has one entry per large segment, per tile or per candidate.
struct Workspace {
  Limits limits;
  Header* header;
  Segment* segments;
  int32_t* num_candidates;   // of a segment; above its capacity when not all of them were kept
  int32_t* histograms;       // kBinsOfAllPasses per segment
  Found* found;              // kPasses per segment
  uint64_t* tile_counts;     // larger than the threshold, and equal to it << 32; then the sums over the tiles before
  int32_t* tile_segment;     // -1 behind the last tile
  int32_t* tile_candidates;  // how many
  int32_t* tile_offset;      // where they are among those of the segment
  int32_t* candidate_index;  // in the segment; ascending in a tile
  int32_t* candidate_key;
};

// Lays the arrays out from `base`; with base == nullptr only counts. Returns the bytes.
inline size_t lay_out(Workspace& w, void* base, int64_t state_numel, int64_t num_segments, int64_t count) {
  w.limits = limits(state_numel, num_segments, count);
  size_t used = 0;
  const auto array = [&](auto*& member, int64_t length) {
    using T = std::remove_reference_t<decltype(*member)>;
    member = base ? reinterpret_cast<T*>(static_cast<char*>(base) + used) : nullptr;
    used += static_cast<size_t>(ceil_div(length * static_cast<int64_t>(sizeof(T)), 256) * 256);
  };
  array(w.header, 1);
  array(w.segments, w.limits.large);
  array(w.num_candidates, w.limits.large);
  array(w.histograms, w.limits.large * kBinsOfAllPasses);
  array(w.found, w.limits.large * kPasses);
  array(w.tile_counts, w.limits.tiles);
  array(w.tile_segment, w.limits.tiles);
  array(w.tile_candidates, w.limits.tiles);
  array(w.tile_offset, w.limits.tiles);
  array(w.candidate_index, w.limits.candidates);
  array(w.candidate_key, w.limits.candidates);
  return used;
}

}  // namespace distopt::cuda
