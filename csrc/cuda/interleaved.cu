// Of each class x[owner :: num_owners] the entries of largest magnitude, reading x once where that is possible.
//
//   1  sample_kernel: a bound that k entries of every class pass, from one sample of all of x;
//   2  collect_kernel, one block per tile: what is above the bound, in order within the tile;
//   3  count_kernel, one warp per stretch of tiles: how many of its candidates belong to each owner;
//   4  scan_kernel, one warp per owner: sums over the stretches before;
//   5  split_kernel, one warp per stretch: each owner's candidates, in order, to the owner's list;
//   6  select_kernel, one block per owner: exactly k from its list, or from the class itself where the list has too few
//      or could not take all.
//
// Limits: where all owners together want more than 1/16 of x, there is no list and step 6 reads x five times, in
// strides.
#include "collect.cuh"
#include "collectives.cuh"
#include "kernels.h"
#include "radix.cuh"
#include "states.cuh"

namespace distopt::cuda {
namespace {

struct Interleaved {
  int64_t numel;
  int64_t k;
  int64_t num_owners;
  int64_t wanted;          // entries that should pass the bound
  int64_t capacity;        // of the candidates; 0: none are collected
  int64_t owner_capacity;  // of an owner's list
  int64_t tiles;
  int64_t stretches;  // of tiles; one warp each
  int32_t* bound;
  int32_t* num_candidates;
  int32_t* tile_offset;
  int32_t* tile_candidates;
  int32_t* candidate_index;  // in x
  int32_t* candidate_key;
  int32_t* cells;        // (stretches, num_owners): candidates, then their sums over the stretches before
  int32_t* owner_total;  // candidates of an owner
  int32_t* owner_index;  // (num_owners, owner_capacity): the lists; index in the class
  int32_t* owner_key;
};

size_t lay_out(Interleaved& w, void* base, int64_t numel, int64_t k, int64_t num_owners) {
  w.numel = numel;
  w.k = k;
  w.num_owners = num_owners;
  // If the largest are spread over the classes at random, every class has k of the `wanted` but for five standard
  // deviations.
  w.wanted = num_owners * (k + static_cast<int64_t>(5 * std::sqrt(static_cast<double>(k))) + 16);
  w.capacity = w.wanted <= numel / 16 ? candidate_capacity(numel, w.wanted) : 0;
  w.owner_capacity = w.capacity ? least(ceil_div(numel, num_owners), 2 * ceil_div(w.capacity, num_owners) + 64) : 0;
  w.tiles = w.capacity ? ceil_div(numel, kTile) : 0;
  w.stretches = least(w.tiles, most(16, least(512, (1 << 20) / num_owners)));
  size_t used = 0;
  const auto array = [&](int32_t*& member, int64_t length) {
    member = base ? reinterpret_cast<int32_t*>(static_cast<char*>(base) + used) : nullptr;
    used += static_cast<size_t>(ceil_div(length * 4, 256) * 256);
  };
  array(w.bound, 1);
  array(w.num_candidates, 1);
  array(w.tile_offset, w.tiles);
  array(w.tile_candidates, w.tiles);
  array(w.candidate_index, w.capacity);
  array(w.candidate_key, w.capacity);
  array(w.cells, w.stretches * num_owners);
  array(w.owner_total, num_owners);
  array(w.owner_index, num_owners * w.owner_capacity);
  array(w.owner_key, num_owners * w.owner_capacity);
  return used;
}

template <class T>
__global__ void __launch_bounds__(kSegmentThreads) sample_kernel(const T* x, Interleaved w) {
  RadixShared& shared = block_shared<RadixShared>();
  const int64_t size = sample_size(w.numel, w.wanted);
  const int64_t stretch = w.numel / size;
  const int64_t rank = bound_rank(size, w.numel, w.wanted);
  int32_t bound = kAcceptAll;
  if (rank < size) {
    int32_t key[kKeysPerThread];
#pragma unroll
    for (int j = 0; j < kKeysPerThread; ++j) {
      const int64_t i = j * kSegmentThreads + static_cast<int>(threadIdx.x);
      key[j] = i < size ? key_of(widen(x[sample_position(i, stretch)])) : kNoKey;
    }
    const auto each = [&](auto visit) {
#pragma unroll
      for (int j = 0; j < kKeysPerThread; ++j) visit(key[j]);
    };
    bound = block_threshold(each, static_cast<int32_t>(rank), shared).prefix - 1;
  }
  if (threadIdx.x == 0) {
    *w.bound = bound;
    *w.num_candidates = 0;
  }
}

template <class T>
__global__ void __launch_bounds__(kTileThreads) collect_kernel(const T* x, Interleaved w) {
  CollectShared& shared = block_shared<CollectShared>();
  const int64_t tile = blockIdx.x;
  const int64_t begin = tile * kTile;
  int32_t key[kSlotsPerThread][kSlot];
  if (begin + kTile <= w.numel) {
    const bool aligned = is_aligned(x);
    Slot<T> slot[kSlotsPerThread];
#pragma unroll
    for (int j = 0; j < kSlotsPerThread; ++j) {
      slot[j] = load_slot(x + begin + (j * kTileThreads + static_cast<int>(threadIdx.x)) * kSlot, aligned);
    }
#pragma unroll
    for (int j = 0; j < kSlotsPerThread; ++j) {
#pragma unroll
      for (int c = 0; c < kSlot; ++c) key[j][c] = key_of(widen(slot[j].at[c]));
    }
  } else {
#pragma unroll
    for (int j = 0; j < kSlotsPerThread; ++j) {
#pragma unroll
      for (int c = 0; c < kSlot; ++c) {
        const int64_t at = begin + (j * kTileThreads + static_cast<int>(threadIdx.x)) * kSlot + c;
        key[j][c] = at < w.numel ? key_of(widen(x[at])) : kNoKey;
      }
    }
  }
  const List list{w.num_candidates, static_cast<int32_t>(w.capacity), w.candidate_index, w.candidate_key};
  collect(key, *w.bound, static_cast<int32_t>(begin), list, w.tile_offset + tile, w.tile_candidates + tile, shared);
}

// Visits the candidates of one stretch in order, up to 32 at a time: visit(whether this lane has one, index, key).
template <class Visit>
__device__ inline void each_candidate(const Interleaved& w, int64_t stretch, const Visit& visit) {
  const int64_t per_stretch = ceil_div(w.tiles, w.stretches);
  const int64_t end = least((stretch + 1) * per_stretch, w.tiles);
  for (int64_t tile = stretch * per_stretch; tile < end; ++tile) {
    const int32_t offset = w.tile_offset[tile], count = w.tile_candidates[tile];
    for (int32_t first = 0; first < count; first += kWarp) {
      const bool mine = first + lane() < count;
      const int32_t at = offset + first + lane();
      visit(mine, mine ? w.candidate_index[at] : 0, mine ? w.candidate_key[at] : kNoKey);
    }
  }
}

__device__ inline bool has_lists(const Interleaved& w) { return w.capacity && *w.num_candidates <= w.capacity; }

// The lanes whose candidate has the owner of this lane's. All lanes must call it.
__device__ inline unsigned same_owner(bool mine, int32_t owner) {
  return __match_any_sync(kAllLanes, mine ? owner : -1);
}

__global__ void __launch_bounds__(kTileThreads) count_kernel(Interleaved w) {
  const int64_t stretch = static_cast<int64_t>(blockIdx.x) * kTileWarps + warp();
  if (stretch >= w.stretches || !has_lists(w)) return;
  int32_t* cells = w.cells + stretch * w.num_owners;
  for (int64_t owner = lane(); owner < w.num_owners; owner += kWarp) cells[owner] = 0;
  __syncwarp();
  each_candidate(w, stretch, [&](bool mine, int32_t index, int32_t) {
    const auto owner = static_cast<int32_t>(index % w.num_owners);
    const unsigned same = same_owner(mine, owner);
    if (mine && (same & lanes_before()) == 0) cells[owner] += __popc(same);  // one lane for all of an owner
    __syncwarp();
  });
}

__global__ void __launch_bounds__(kTileThreads) scan_kernel(Interleaved w) {
  const int64_t owner = static_cast<int64_t>(blockIdx.x) * kTileWarps + warp();
  if (owner >= w.num_owners || !has_lists(w)) return;
  int32_t before = 0;
  for (int64_t first = 0; first < w.stretches; first += kWarp) {
    const int64_t stretch = first + lane();
    int32_t* cell = w.cells + stretch * w.num_owners + owner;
    const int32_t mine = stretch < w.stretches ? *cell : 0;
    const int32_t inclusive = warp_inclusive_sum(mine);
    if (stretch < w.stretches) *cell = before + inclusive - mine;
    before += __shfl_sync(kAllLanes, inclusive, kWarp - 1);
  }
  if (lane() == 0) w.owner_total[owner] = before;
}

__global__ void __launch_bounds__(kTileThreads) split_kernel(Interleaved w) {
  const int64_t stretch = static_cast<int64_t>(blockIdx.x) * kTileWarps + warp();
  if (stretch >= w.stretches || !has_lists(w)) return;
  int32_t* cells = w.cells + stretch * w.num_owners;
  each_candidate(w, stretch, [&](bool mine, int32_t index, int32_t key) {
    const auto owner = static_cast<int32_t>(index % w.num_owners);
    const unsigned same = same_owner(mine, owner);
    const int32_t at = mine ? cells[owner] + __popc(same & lanes_before()) : 0;
    __syncwarp();
    if (mine && (same & lanes_before()) == 0) cells[owner] += __popc(same);
    __syncwarp();
    if (mine && at < w.owner_capacity) {
      w.owner_index[owner * w.owner_capacity + at] = static_cast<int32_t>(index / w.num_owners);
      w.owner_key[owner * w.owner_capacity + at] = key;
    }
  });
}

struct SelectShared {
  RadixShared radix;
  PlaceShared place;
};

template <class T>
__global__ void __launch_bounds__(kTileThreads) select_kernel(const T* x, Interleaved w, T* values, int32_t* indices) {
  SelectShared& shared = block_shared<SelectShared>();
  const int64_t owner = blockIdx.x;
  const bool from_list = has_lists(w) && w.owner_total[owner] >= w.k && w.owner_total[owner] <= w.owner_capacity;
  const int32_t* list_index = w.owner_index + owner * w.owner_capacity;
  const int32_t* list_key = w.owner_key + owner * w.owner_capacity;
  const int64_t count = from_list ? w.owner_total[owner] : ceil_div(w.numel - owner, w.num_owners);
  const auto key_at = [&](int64_t i) { return from_list ? list_key[i] : key_of(widen(x[owner + i * w.num_owners])); };
  const auto each = [&](auto visit) {
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) visit(key_at(i));
  };
  const Found threshold = block_threshold(each, static_cast<int32_t>(w.k), shared.radix);
  Met met;
  int round = 0;
  for (int64_t first = 0; first < count; first += blockDim.x) {
    const int64_t i = first + threadIdx.x;
    const int32_t at = block_place(i < count ? key_at(i) : kNoKey, threshold, met, round++, shared.place);
    if (at < 0) continue;
    const int64_t index = from_list ? list_index[i] : i;
    values[owner * w.k + at] = x[owner + index * w.num_owners];
    indices[owner * w.k + at] = static_cast<int32_t>(index);
  }
}

template <class T>
cudaError_t run(const T* x, const Interleaved& w, T* values, int32_t* indices, cudaStream_t stream) {
  Launcher launch{stream};
  if (w.capacity) {
    launch(sample_kernel<T>, 1, kSegmentThreads, x, w);
    launch(collect_kernel<T>, w.tiles, kTileThreads, x, w);
    launch(count_kernel, ceil_div(w.stretches, kTileWarps), kTileThreads, w);
    launch(scan_kernel, ceil_div(w.num_owners, kTileWarps), kTileThreads, w);
    launch(split_kernel, ceil_div(w.stretches, kTileWarps), kTileThreads, w);
  }
  launch(select_kernel<T>, w.num_owners, kTileThreads, x, w, values, indices);
  return launch.error;
}

}  // namespace

size_t interleaved_workspace_bytes(int64_t numel, int64_t k, int64_t num_owners) {
  Interleaved w;
  return lay_out(w, nullptr, numel, k, num_owners);
}

cudaError_t topk_abs_interleaved(DType dtype, const void* x, int64_t numel, int64_t k, int64_t num_owners, void* values,
                                 int32_t* indices, void* workspace, cudaStream_t stream) {
  if (k == 0) return cudaSuccess;
  Interleaved w;
  lay_out(w, workspace, numel, k, num_owners);
  switch (dtype) {
    case DType::kFloat32:
      return run(static_cast<const float*>(x), w, static_cast<float*>(values), indices, stream);
    case DType::kBFloat16:
      return run(static_cast<const BFloat16*>(x), w, static_cast<BFloat16*>(values), indices, stream);
    case DType::kFloat16:
      return run(static_cast<const Float16*>(x), w, static_cast<Float16*>(values), indices, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace distopt::cuda
