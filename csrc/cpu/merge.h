// The candidates of consecutive parts as one list.
#pragma once

#include <algorithm>
#include <cstdint>

#include "select.h"

namespace distopt::cpu {

// Moves what parts[1..num_parts) hold behind what parts[0] holds, still ascending. All must point into one buffer, in
// this order.
inline Candidates merge(const Candidates* parts, int64_t num_parts) {
  Candidates all = parts[0];
  for (int64_t i = 1; i < num_parts; ++i) {
    std::copy_n(parts[i].index, parts[i].count, all.index + all.count);
    std::copy_n(parts[i].key, parts[i].count, all.key + all.count);
    all.count += parts[i].count;
  }
  return all;
}

}  // namespace distopt::cpu
