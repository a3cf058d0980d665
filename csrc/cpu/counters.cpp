#include "counters.h"

#include <atomic>

namespace distopt::cpu {
namespace {

std::atomic<int64_t> totals[kNumCounters];

}  // namespace

void count(Counter counter, int64_t events) {
  if (events) totals[static_cast<int>(counter)].fetch_add(events, std::memory_order_relaxed);
}

int64_t total(Counter counter) { return totals[static_cast<int>(counter)].load(std::memory_order_relaxed); }

}  // namespace distopt::cpu
