// Memory that a thread keeps between calls: a fresh buffer of 100 MB costs more in page faults than the selection
// itself.
//
// Limits: it grows to what the largest tensor needed (about one byte per element) and is freed with its thread.
#pragma once

#include <cstdint>
#include <memory>

namespace distopt::cpu {

struct Workspace {
  std::unique_ptr<int32_t[]> index;
  std::unique_ptr<int32_t[]> key;
  int64_t capacity = 0;

  void reserve(int64_t wanted) {
    if (wanted <= capacity) return;
    capacity = 0;
    index.reset();
    key.reset();
    index.reset(new int32_t[wanted]);  // not zeroed: pages are touched only when used
    key.reset(new int32_t[wanted]);
    capacity = wanted;
  }

  static Workspace& of_this_thread() {
    thread_local Workspace workspace;
    return workspace;
  }
};

}  // namespace distopt::cpu
