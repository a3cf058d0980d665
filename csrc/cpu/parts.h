// [0, n) cut into one stretch per thread, each starting at a whole block.
#pragma once

#include <algorithm>
#include <cstdint>

#include "select.h"
#include "threads.h"

namespace distopt::cpu {

struct Parts {
  static constexpr int64_t kMost = 64;               // callers keep one record per part on the stack
  static constexpr int64_t kWorthAThread = 1 << 16;  // elements: below, waking a thread costs more than it does

  int64_t n;
  int64_t count;

  Parts(int64_t n, const Threads& threads)
      : n(n), count(std::clamp<int64_t>(n / kWorthAThread, 1, std::min(threads.count(), kMost))) {}

  int64_t begin(int64_t part) const { return part == count ? n : n / kBlock * part / count * kBlock; }
  int64_t end(int64_t part) const { return begin(part + 1); }
  // No part is longer.
  int64_t longest() const { return n / count + 2 * kBlock; }
};

}  // namespace distopt::cpu
