// Updates a flat tensor and takes out its k entries of largest magnitude: exact for every input, at the speed of the
// update alone when k is small.
//
// Paper: Lin et al., Deep Gradient Compression, ICLR 2018. NaN ranks largest, ties go to the lowest index.
// Limits: n < 2^31; k <= n.
#pragma once

#include <cstdint>

#include "job.h"
#include "threads.h"

namespace distopt::cpu {

// indices[0..k): ascending. values[0..k): float for a Job that updates, else in the dtype of v.
// With an update, v is zero at the indices afterwards, and so is u if `masking`.
// False: a gradient to be taken was not finite (see Job::take). Nothing was taken out and written to values; what came
// before the first block that is not finite, of each thread, is in u and v, and that block still is in grad.
bool sparsify(const Job& job, int64_t n, int64_t k, bool masking, const Threads& threads, void* values,
              int32_t* indices);

}  // namespace distopt::cpu
