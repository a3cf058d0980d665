#include "sample.h"

#include <algorithm>
#include <cmath>

#include "dtypes.h"
#include "parts.h"
#include "select.h"

namespace distopt::cpu {
namespace {

float element(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32:
      return load(static_cast<const float*>(data) + i);
    case DType::kBFloat16:
      return load(static_cast<const BFloat16*>(data) + i);
    case DType::kFloat16:
      return load(static_cast<const Float16*>(data) + i);
  }
  return 0;
}

// |v| after the update. Not rounded to a 16-bit v: the bound need not be exact.
int32_t new_key(const Job& job, int64_t i) {
  float v = element(job.v, job.state_dtype, i);
  if (job.update == Update::kNone) return key_of(v);
  const float g = element(job.grad, job.grad_dtype, i);
  if (job.update == Update::kAccumulate) return key_of(v + g);
  const float u = element(job.u, job.state_dtype, i);
  if (job.update == Update::kHeavyBall) return key_of(v + (u * job.momentum + g));
  return key_of(v + ((u + g) * job.momentum + g));
}

// The rank at which a sample of `size` holds k of n, and five standard deviations of it.
struct Rank {
  double expected;
  double margin;
};

Rank rank_in_sample(int64_t size, int64_t n, int64_t k) {
  const double part = static_cast<double>(k) / static_cast<double>(n);
  const double expected = static_cast<double>(size) * part;
  return {expected, 5 * std::sqrt(expected * (1 - part))};
}

}  // namespace

int64_t sample_size(int64_t n, int64_t k) {
  constexpr int64_t kTooSmall = 1 << 12;  // ranking everything costs as little
  constexpr int64_t kWantedAbove = 16;    // samples among the k largest: trades sampling against candidates
  constexpr int64_t kAtLeast = 4096;
  if (n <= kTooSmall) return 0;
  return std::min(std::max(kWantedAbove * (n / k), kAtLeast), n / 128);
}

void sample_keys(const Job& job, int64_t n, int32_t* keys, int64_t size, const Threads& threads) {
  const int64_t stretch = n / size;
  const Parts parts(n, threads);  // as many parts as the pass has: each sample is a miss of the cache
  threads.each(parts.count, [&](int64_t part) {
    for (int64_t i = size * part / parts.count; i < size * (part + 1) / parts.count; ++i) {
      const uint64_t hash = static_cast<uint32_t>(i) * 2654435761u;  // Knuth's multiplicative hash
      keys[i] = new_key(job, i * stretch + static_cast<int64_t>((hash * static_cast<uint64_t>(stretch)) >> 32));
    }
  });
}

int32_t bound_from_sample(const int32_t* keys, int64_t size, int64_t n, int64_t k) {
  const Rank rank = rank_in_sample(size, n, k);
  const auto low = static_cast<int64_t>(std::ceil(rank.expected + rank.margin)) + 1;
  // One below that sample, so that keys equal to it pass: they may all be needed when many are equal.
  return low < size ? threshold(keys, size, low).bound() : kAcceptAll;
}

int32_t ceiling_from_sample(const int32_t* keys, int64_t size, int64_t n, int64_t k) {
  const Rank rank = rank_in_sample(size, n, k);
  const auto high = static_cast<int64_t>(std::floor(rank.expected - rank.margin)) - 1;
  return high > 0 ? threshold(keys, size, high).key : kNoCeiling;
}

}  // namespace distopt::cpu
