// What the selections of this process did, counted by all threads since it started: evidence for tests and users that
// the rare ways stay rare and that nothing is allocated in steady state.
#pragma once

#include <cstdint>

namespace distopt::cpu {

enum class Counter : int {
  kSelections,         // tensors or segments that were selected from, k > 0; the owners of a tensor count once
  kSecondCollections,  // passes over all of v made again because a sample misled
  kFullBuffers,        // buffers of candidates that filled up: ties, or a sample that misled
  kWorkspaceGrowths,   // allocations of a thread's workspace
};
inline constexpr int kNumCounters = 4;

void count(Counter counter, int64_t events = 1);

int64_t total(Counter counter);

}  // namespace distopt::cpu
