// Memory that a thread keeps between calls: a fresh buffer of 100 MB costs more in page faults than the selection
// itself.
//
// Limits: it grows to what the largest tensor needed (about one byte per element) and is freed with its thread.
#pragma once

#include <cstdint>
#include <memory>

#include "counters.h"

namespace distopt::cpu {

class Buffer {
 public:
  // At least `wanted` entries; what they held is lost when it grows.
  int32_t* reserve(int64_t wanted) {
    if (wanted > capacity_) {
      count(Counter::kWorkspaceGrowths);
      capacity_ = 0;
      entries_.reset();
      entries_.reset(new int32_t[wanted]);  // not zeroed: pages are touched only when used
      capacity_ = wanted;
    }
    return entries_.get();
  }

 private:
  std::unique_ptr<int32_t[]> entries_;
  int64_t capacity_ = 0;
};

struct Workspace {
  Buffer index;
  Buffer key;
  Buffer largest;

  static Workspace& of_this_thread() {
    thread_local Workspace workspace;
    return workspace;
  }
};

}  // namespace distopt::cpu
