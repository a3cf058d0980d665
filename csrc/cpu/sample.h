// A bound that somewhat more than k of n keys exceed, from a sample of what v is about to become.
//
// Stratified: one position from each stretch of equal length, displaced by a fixed hash so that a period in the data
// (the columns of a matrix) does not meet the stride. The order statistic leaves a margin of five standard deviations,
// so that fewer than k above it is rare for any distribution; being wrong costs time, never exactness. Source: the
// sampled threshold of Lin et al., Deep Gradient Compression, section 3, made one-sided.
#pragma once

#include <cstdint>

#include "job.h"

namespace distopt::cpu {

// How many samples pay off; 0: none, start from kAcceptAll instead.
int64_t sample_size(int64_t n, int64_t k);

// Reads grad, u and v at `size` positions, writes nothing but keys[0..size). size and k in [1, n].
int32_t sample_bound(const Job& job, int64_t n, int64_t k, int32_t* keys, int64_t size);

}  // namespace distopt::cpu
