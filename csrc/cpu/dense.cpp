#include "dense.h"

#include <atomic>

#include "kernels.h"
#include "parts.h"

namespace distopt::cpu {

bool scale(float* x, int64_t n, float factor, const Threads& threads) {
  const auto& table = kernels();
  const Parts parts(n, threads);
  std::atomic<bool> finite{true};
  threads.each(parts.count, [&](int64_t part) {
    if (!table.scale(x, parts.begin(part), parts.end(part), factor)) finite.store(false, std::memory_order_relaxed);
  });
  return finite;
}

void momentum(float* g, float* u, int64_t n, float m, bool nesterov, const Threads& threads) {
  const auto& table = kernels();
  const Parts parts(n, threads);
  threads.each(parts.count,
               [&](int64_t part) { table.momentum(g, u, parts.begin(part), parts.end(part), m, nesterov); });
}

void decay(const Decay& job, int64_t n, const Threads& threads) {
  const auto& table = kernels();
  const Parts parts(n, threads);
  threads.each(parts.count, [&](int64_t part) { table.decay(job, parts.begin(part), parts.end(part)); });
}

void weighted_sum(const WeightedSum& job, int64_t n, const Threads& threads) {
  const auto& table = kernels();
  const Parts parts(n, threads);
  threads.each(parts.count, [&](int64_t part) { table.weighted_sum(job, parts.begin(part), parts.end(part)); });
}

}  // namespace distopt::cpu
