// Applies the update of a job to a whole flat tensor and finds the positions of the k largest |v|, exactly.
//
// Three ways, chosen by what the sizes make cheapest; all give the same positions. The second collection that a
// sample may make necessary is counted (counters.h).
#pragma once

#include <cstdint>

#include "job.h"
#include "threads.h"

namespace distopt::cpu {

// indices[0..k): ascending. k in [0, n]. False, here and below: the gradient was not finite (see Job::take) and nothing
// was selected.
bool select(const Job& job, int64_t n, int64_t k, const Threads& threads, int32_t* indices);

// What stays in the cache: the pass keeps the largest key of each block; the k-th largest of these bounds the k-th key
// from below, and only blocks above it are looked at again. No sample, no second collection. k in [1, blocks of n].
bool select_by_maxima(const Job& job, int64_t n, int64_t k, const Threads& threads, int32_t* indices);

// Few of many: the pass that updates also collects what a bound from a sample lets through. k in [1, n].
bool select_by_candidates(const Job& job, int64_t n, int64_t k, const Threads& threads, int32_t* indices);

// Many of many: the pass that updates keeps only what may be the k-th, a second one collects. k in [1, n].
bool select_by_threshold(const Job& job, int64_t n, int64_t k, const Threads& threads, int32_t* indices);

}  // namespace distopt::cpu
