// One pass each over what is sent whole, written once over a vector type Vec (see pass.h, which includes the same way).
#pragma once

#include <type_traits>

#include "kernels.h"
#include "scalar_vec.h"

namespace distopt::cpu {
namespace {

// x *= factor; whether all of x was finite. Stops early if not, within kChunk elements of the first that is not.
template <class Vec>
int64_t scale(float* x, int64_t begin, int64_t end, float factor, bool* finite) {
  constexpr int64_t kChunk = 4096;
  const auto by = Vec::set1(factor);
  int64_t i = begin;
  while (i + Vec::kWidth <= end) {
    const int64_t stop = end - i < kChunk ? end : i + kChunk;
    auto largest = Vec::key(Vec::load(x + i));
    for (; i + Vec::kWidth <= stop; i += Vec::kWidth) {
      const auto xi = Vec::load(x + i);
      largest = Vec::max(largest, Vec::key(xi));
      Vec::store(x + i, Vec::mul(xi, by));
    }
    *finite = !Vec::any_above(largest, kLargestFiniteKey);
    if (!*finite) break;
  }
  return i;
}

template <class Vec>
bool scale_any(float* x, int64_t begin, int64_t end, float factor) {
  bool finite = true;
  const int64_t done = scale<Vec>(x, begin, end, factor, &finite);
  if (finite) scale<ScalarVec>(x, done, end, factor, &finite);
  return finite;
}

template <class Vec, bool kNesterov>
int64_t momentum(float* g, float* u, int64_t begin, int64_t end, float m) {
  const auto by = Vec::set1(m);
  int64_t i = begin;
  for (; i + Vec::kWidth <= end; i += Vec::kWidth) {
    const auto gi = Vec::load(g + i);
    const auto ui = Vec::load(u + i);
    if constexpr (kNesterov) {
      Vec::store(g + i, Vec::add(Vec::store(u + i, Vec::mul(Vec::add(ui, gi), by)), gi));
    } else {
      Vec::store(g + i, Vec::store(u + i, Vec::add(Vec::mul(ui, by), gi)));
    }
  }
  return i;
}

template <class Vec>
void momentum_any(float* g, float* u, int64_t begin, int64_t end, float m, bool nesterov) {
  if (nesterov) {
    momentum<ScalarVec, true>(g, u, momentum<Vec, true>(g, u, begin, end, m), end, m);
  } else {
    momentum<ScalarVec, false>(g, u, momentum<Vec, false>(g, u, begin, end, m), end, m);
  }
}

template <class Vec, bool kNesterov, class P>
int64_t decay(const Decay& job, int64_t begin, int64_t end) {
  const auto* p = static_cast<const P*>(job.parameter);
  const auto rate = Vec::set1(job.rate), by = Vec::set1(job.momentum);
  int64_t i = begin;
  for (; i + Vec::kWidth <= end; i += Vec::kWidth) {
    const auto added = Vec::mul(Vec::load(p + i), rate);
    auto di = Vec::load(job.buffer + i);
    auto xi = Vec::load(job.update + i);
    if constexpr (kNesterov) {
      di = Vec::mul(Vec::add(di, added), by);
      xi = Vec::add(Vec::add(xi, di), added);
    } else {
      di = Vec::add(Vec::mul(di, by), added);
      xi = Vec::add(xi, di);
    }
    Vec::store(job.buffer + i, di);
    Vec::store(job.update + i, xi);
  }
  return i;
}

template <class Vec, class P>
void decay_typed(const Decay& job, int64_t begin, int64_t end) {
  if (job.nesterov) {
    decay<ScalarVec, true, P>(job, decay<Vec, true, P>(job, begin, end), end);
  } else {
    decay<ScalarVec, false, P>(job, decay<Vec, false, P>(job, begin, end), end);
  }
}

template <class Vec>
void decay_any(const Decay& job, int64_t begin, int64_t end) {
  switch (job.parameter_dtype) {
    case DType::kFloat32:
      return decay_typed<Vec, float>(job, begin, end);
    case DType::kBFloat16:
      return decay_typed<Vec, BFloat16>(job, begin, end);
    case DType::kFloat16:
      return decay_typed<Vec, Float16>(job, begin, end);
  }
}

// Adds kRows rows to elements [begin, end) of out, or starts with them.
template <class Vec, bool kFresh, int kRows, class X>
int64_t add_rows(float* out, const void* const* rows, const float* weights, int64_t begin, int64_t end) {
  const X* row[kRows];
  decltype(Vec::set1(0.0f)) weight[kRows];
  for (int r = 0; r < kRows; ++r) {
    row[r] = static_cast<const X*>(rows[r]);
    weight[r] = Vec::set1(weights[r]);
  }
  int64_t i = begin;
  for (; i + Vec::kWidth <= end; i += Vec::kWidth) {
    auto sum = Vec::mul(Vec::load(row[0] + i), weight[0]);
    if constexpr (!kFresh) sum = Vec::add(Vec::load(out + i), sum);
    for (int r = 1; r < kRows; ++r) sum = Vec::add(sum, Vec::mul(Vec::load(row[r] + i), weight[r]));
    Vec::store(out + i, sum);
  }
  return i;
}

// The more rows in one pass, the fewer times the sum is read and written.
template <class Vec, class X>
int64_t weighted_sum_block(const WeightedSum& job, int64_t begin, int64_t end) {
  int64_t r = 0, done = begin;
  const auto add = [&](auto fresh, auto count) {
    done = add_rows<Vec, fresh, count, X>(job.out, job.rows + r, job.weights + r, begin, end);
    r += count;
  };
  constexpr std::integral_constant<int, 8> eight;
  constexpr std::integral_constant<int, 4> four;
  constexpr std::integral_constant<int, 1> one;
  if (job.num_rows >= eight) {
    add(std::true_type(), eight);
  } else if (job.num_rows >= four) {
    add(std::true_type(), four);
  } else {
    add(std::true_type(), one);
  }
  while (r + eight <= job.num_rows) add(std::false_type(), eight);
  if (r + four <= job.num_rows) add(std::false_type(), four);
  while (r < job.num_rows) add(std::false_type(), one);
  return done;
}

template <class Vec, class X>
void weighted_sum_typed(const WeightedSum& job, int64_t begin, int64_t end) {
  // Of the sum: it stays in the second cache while it collects all rows, and each row is read in long stretches.
  constexpr int64_t kChunk = 32768;
  for (int64_t i = begin; i < end; i += kChunk) {
    const int64_t stop = end - i < kChunk ? end : i + kChunk;
    weighted_sum_block<ScalarVec, X>(job, weighted_sum_block<Vec, X>(job, i, stop), stop);
  }
}

template <class Vec>
void weighted_sum_any(const WeightedSum& job, int64_t begin, int64_t end) {
  switch (job.dtype) {
    case DType::kFloat32:
      return weighted_sum_typed<Vec, float>(job, begin, end);
    case DType::kBFloat16:
      return weighted_sum_typed<Vec, BFloat16>(job, begin, end);
    case DType::kFloat16:
      return weighted_sum_typed<Vec, Float16>(job, begin, end);
  }
}

}  // namespace
}  // namespace distopt::cpu
