// A bound that somewhat more than k of n keys exceed, and a ceiling that somewhat fewer exceed, from a sample of what v
// is about to become.
//
// Stratified: one position from each stretch of equal length, displaced by a fixed hash so that a period in the data
// (the columns of a matrix) does not meet the stride. The order statistics leave a margin of five standard deviations,
// so that k is rarely outside for any distribution; being wrong costs time, never exactness. Source: the
// sampled threshold of Lin et al., Deep Gradient Compression, section 3, made one-sided.
#pragma once

#include <cstdint>

#include "job.h"
#include "threads.h"

namespace distopt::cpu {

// How many samples pay off; 0: none, start from kAcceptAll instead.
int64_t sample_size(int64_t n, int64_t k);

// Reads grad, u and v at `size` positions, writes nothing but keys[0..size). size in [1, n].
void sample_keys(const Job& job, int64_t n, int32_t* keys, int64_t size, const Threads& threads);

// Where the sample says that probably more than k of n keys are above; kAcceptAll where it cannot say. k in [1, n].
int32_t bound_from_sample(const int32_t* keys, int64_t size, int64_t n, int64_t k);

// Where the sample says that probably fewer than k of n keys are above; kNoCeiling where it cannot say.
int32_t ceiling_from_sample(const int32_t* keys, int64_t size, int64_t n, int64_t k);

}  // namespace distopt::cpu
