// Passes over tensors that are sent whole, each reading and writing every element once: with momentum and weight decay
// they are bound by memory, and torch's own take one pass per arithmetic operation.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "threads.h"

namespace distopt::cpu {

// Weight decay with a momentum d of its own, for one tensor p: `d = m d + wd p; update += d`
// (Nesterov: `d = m (d + wd p); update += d; update += wd p`).
struct Decay {
  float* update;
  float* buffer;  // d
  const void* parameter;
  DType parameter_dtype;
  float rate;  // wd
  float momentum;
  bool nesterov;
};

// out = w0 row0 + w1 row1 + ..., at least one row. Added up in this order, product and sum rounded each: the same bits
// on every path and by every number of threads.
struct WeightedSum {
  float* out;
  const void* const* rows;
  const float* weights;
  int64_t num_rows;
  DType dtype;  // of the rows
};

// x *= factor. Whether x was finite; if not, it still is not, and some of it may not have been scaled.
bool scale(float* x, int64_t n, float factor, const Threads& threads);

// The momentum step, in place of the gradient: `u = m u + g; g = u` (Nesterov: `u = m (u + g); g = u + g`).
void momentum(float* g, float* u, int64_t n, float m, bool nesterov, const Threads& threads);

void decay(const Decay& job, int64_t n, const Threads& threads);

void weighted_sum(const WeightedSum& job, int64_t n, const Threads& threads);

}  // namespace distopt::cpu
