// Decoding: adds received (index, value) pairs into a dense tensor, in their order, so that all ranks get equal bits.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace distopt::cpu {

// The position of the first index that is not in [0, n), or -1. Indices come from the network: look before writing.
inline int64_t first_out_of_range(const int32_t* indices, int64_t count, int64_t n) {
  for (int64_t i = 0; i < count; ++i) {
    if (static_cast<uint32_t>(indices[i]) >= n) return i;  // as unsigned, a negative index is beyond every n < 2^31
  }
  return -1;
}

// out[indices[i]] += values[i] for i = 0, 1, ...
template <class Out, class Value>
void scatter_add(Out* out, const int32_t* indices, const Value* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (sizeof(Value) == 2) {
      out[indices[i]] += static_cast<Out>(load(values + i));
    } else {
      out[indices[i]] += static_cast<Out>(values[i]);
    }
  }
}

}  // namespace distopt::cpu
