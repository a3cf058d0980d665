// The operations on CUDA memory: plain pointers and a stream, no torch.
//
// Every function only enqueues kernels on the stream and returns: nothing here waits for the device, allocates or
// reads device memory from the host, so all of it can be captured in a CUDA graph. Temporary memory comes from the
// caller. All pointers are device pointers. The returned error is that of the launches.
#pragma once

#include <cstddef>
#include <cstdint>

#include "portable.cuh"

namespace distopt::cuda {

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

enum class Update {
  kNone,        // v stays: plain top-k
  kAccumulate,  // v += g: error feedback
  kHeavyBall,   // u = m u + g; v += u
  kNesterov,    // u = m (u + g); v += u + g
};

// Updates flat states and takes out, of each segment, its k entries of largest magnitude: exact, ties to the lowest
// index, NaN largest.
//
// A segment is a row (start in grad, numel, k); the segments' states lie one behind the other in u and v. With
// segments == nullptr there is one: (0, state_numel, count).
// values: float with an update, else in the dtype of v. indices: positions in grad, ascending.
// With an update, v is zero at the selected entries afterwards, and so is u if `masking`.
// A table whose rows are not ascending, apart and inside grad, or whose sums are not state_numel and count, is counted
// (take_table_errors); nothing outside the tensors is touched, and what the results hold is undefined.
struct Sparsify {
  Update update;
  DType grad_dtype;
  DType state_dtype;        // of u and v; kFloat16 only with kNone
  const void* grad;         // nullptr with kNone
  int64_t grad_numel;       // state_numel with kNone
  void* u;                  // nullptr unless kHeavyBall or kNesterov
  void* v;                  // never written with kNone
  int64_t state_numel;      // < 2^31
  const int64_t* segments;  // (num_segments, 3), or nullptr
  int64_t num_segments;     // 1 with segments == nullptr
  int64_t count;            // the sum of all k
  float momentum;
  bool masking;
  void* values;      // (count,)
  int32_t* indices;  // (count,)
};

// Bytes of temporary memory that `sparsify` needs; a multiple of 256. Depends on sizes alone.
size_t sparsify_workspace_bytes(int64_t state_numel, int64_t num_segments, int64_t count);

cudaError_t sparsify(const Sparsify& job, void* workspace, cudaStream_t stream);

// Of each class x[owner :: num_owners] the k entries of largest magnitude; indices local to the class, ascending.
// values (num_owners, k) in the dtype of x, indices (num_owners, k). k <= numel / num_owners.
size_t interleaved_workspace_bytes(int64_t numel, int64_t k, int64_t num_owners);

cudaError_t topk_abs_interleaved(DType dtype, const void* x, int64_t numel, int64_t k, int64_t num_owners, void* values,
                                 int32_t* indices, void* workspace, cudaStream_t stream);

// out[indices[i]] += values[i]. The indices of one call must differ. An index outside [0, numel) writes nothing and is
// counted (take_index_errors). out is kFloat32 or kFloat64; values not wider.
cudaError_t scatter_add(DType out_dtype, void* out, int64_t numel, const int32_t* indices, DType value_dtype,
                        const void* values, int64_t count, cudaStream_t stream);

// *result = whether x holds neither NaN nor Inf.
cudaError_t all_finite(DType dtype, const void* x, int64_t numel, bool* result, cudaStream_t stream);

// What went wrong on this device since the last look, because the host could not be told at once: indices out of range,
// and segment tables that contradict themselves or the sizes. Written to *count (device memory) and set back to 0.
cudaError_t take_index_errors(int32_t* count, cudaStream_t stream);
cudaError_t take_table_errors(int32_t* count, cudaStream_t stream);

}  // namespace distopt::cuda
