// sparsify on many tensors of one flat bucket in one call: what a small tensor costs is then its own elements, not a
// call.
//
// Limits: as sparsify, for the bucket and for all states together.
#pragma once

#include <cstdint>

#include "job.h"
#include "threads.h"

namespace distopt::cpu {

// One row of the table: grad[start .. start + numel), from which k are taken. The states of the segments lie one behind
// the other.
struct Segment {
  int64_t start;
  int64_t numel;
  int64_t k;
};
static_assert(sizeof(Segment) == 3 * sizeof(int64_t), "the rows of an int64 tensor");

// Why the table cannot be used: a rule, and the row that breaks it (-1: the sums). rule is nullptr if it can be.
struct Problem {
  const char* rule;
  int64_t row;
};

// Rows ascending, apart and inside grad; numel adds up to that of the states, k to count.
Problem check(const Segment* segments, int64_t num_segments, int64_t grad_numel, int64_t state_numel, int64_t count);

// The segments must have passed check. indices[0..count): positions in grad, ascending. values[0..count): float.
// -1, or, only with Job::take, the first row whose gradient is not finite: it still is not, values are zeros at
// 0..count-1, and v holds all that was selected before (u is masked there).
int64_t sparsify_segments(const Job& job, const Segment* segments, int64_t num_segments, bool masking,
                          const Threads& threads, float* values, int32_t* indices);

}  // namespace distopt::cpu
