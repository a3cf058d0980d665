// Updates flat states and takes out the entries of largest magnitude of each segment: one launch set for all segments,
// without a decision on the host.
//
//   1  segment_kernel, one block per segment: where its states, results, tiles and candidates begin;
//   2    a small segment is finished at once, its keys in registers;
//   3    of a large one a sample of the new v gives a bound that somewhat more than k entries pass;
//   4  update_kernel, one block per tile: the fused pass, reads g, u, v and writes u, v; what is above the bound is
//      appended to the candidates, in order within the tile;
//   5  histogram_kernel, three launches: the digits of the k-th key, from the candidates or, where they do not suffice,
//      from v;
//   6  count_kernel: per tile, how many are larger than it or equal to it;
//   7  scan_kernel: sums of these over the tiles before;
//   8  take_kernel: writes the selected ones in ascending order, zeroes them in v and u.
//
// The result does not depend on the order in which blocks run: atomics only count, or hand out room for the candidates
// of a tile, which are found again through the tile.
//
// Paper: Lin et al., Deep Gradient Compression, ICLR 2018. Limits: fewer than 2^31 elements; reading the table costs
// each block the rows before its own, which is nothing for thousands of segments and too much for 100,000.
#include "segment_kernel.cuh"
#include "select_kernels.cuh"
#include "update_kernel.cuh"

namespace distopt::cuda {
namespace {

// Blocks of the kernels that share the tiles out: enough to fill the device, few enough that each writes its histogram
// out for several tiles.
constexpr int64_t kMostBlocks = 1024;

__global__ void take_table_errors_kernel(int32_t* count) { *count = atomicExch(&table_errors, 0); }

template <Update kUpdate, class G, class S>
cudaError_t run(const Sparsify& job, const Workspace& w, cudaStream_t stream) {
  Launcher launch{stream};
  launch(segment_kernel<kUpdate, G, S>, job.num_segments, kSegmentThreads, job, w);
  launch(update_kernel<kUpdate, G, S>, w.limits.tiles, kTileThreads, job, w);
  if (job.count > 0) {
    const int64_t blocks = least(kMostBlocks, ceil_div(w.limits.tiles, kTileWarps));
    const S* v = static_cast<const S*>(job.v);
    for (int pass = 0; pass < kPasses; ++pass) launch(histogram_kernel<S>, blocks, kTileThreads, v, w, pass);
    launch(count_kernel<S>, blocks, kTileThreads, v, w);
    launch(scan_kernel, w.limits.large, kSegmentThreads, w);
    launch(take_kernel<kUpdate, S>, blocks, kTileThreads, job, w);
  }
  return launch.error;
}

template <Update kUpdate, class S>
cudaError_t with_grad(const Sparsify& job, const Workspace& w, cudaStream_t stream) {
  switch (job.grad_dtype) {
    case DType::kFloat32:
      return run<kUpdate, float, S>(job, w, stream);
    case DType::kBFloat16:
      return run<kUpdate, BFloat16, S>(job, w, stream);
    case DType::kFloat16:
      return run<kUpdate, Float16, S>(job, w, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <Update kUpdate>
cudaError_t with_state(const Sparsify& job, const Workspace& w, cudaStream_t stream) {
  switch (job.state_dtype) {
    case DType::kFloat32:
      return with_grad<kUpdate, float>(job, w, stream);
    case DType::kBFloat16:
      return with_grad<kUpdate, BFloat16>(job, w, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <>
cudaError_t with_state<Update::kNone>(const Sparsify& job, const Workspace& w, cudaStream_t stream) {
  switch (job.state_dtype) {
    case DType::kFloat32:
      return run<Update::kNone, float, float>(job, w, stream);
    case DType::kBFloat16:
      return run<Update::kNone, float, BFloat16>(job, w, stream);
    case DType::kFloat16:
      return run<Update::kNone, float, Float16>(job, w, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

size_t sparsify_workspace_bytes(int64_t state_numel, int64_t num_segments, int64_t count) {
  Workspace w;
  return lay_out(w, nullptr, state_numel, num_segments, count);
}

cudaError_t sparsify(const Sparsify& job, void* workspace, cudaStream_t stream) {
  Workspace w;
  lay_out(w, workspace, job.state_numel, job.num_segments, job.count);
  switch (job.update) {
    case Update::kNone:
      return with_state<Update::kNone>(job, w, stream);
    case Update::kAccumulate:
      return with_state<Update::kAccumulate>(job, w, stream);
    case Update::kHeavyBall:
      return with_state<Update::kHeavyBall>(job, w, stream);
    case Update::kNesterov:
      return with_state<Update::kNesterov>(job, w, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t take_table_errors(int32_t* count, cudaStream_t stream) {
  Launcher launch{stream};
  launch(take_table_errors_kernel, 1, 1, count);
  return launch.error;
}

}  // namespace distopt::cuda
