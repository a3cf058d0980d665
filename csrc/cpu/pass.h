// The fused pass over a tensor, written once over a vector type Vec: update u and v, rank the new v, keep the
// candidates.
//
// Included by each kernels_*.cpp after its Vec, inside the reach of its target options; everything here is local to
// that file. Vec gives kWidth lanes, load, store (returns what the memory now holds), zero, add, mul, set1, key, max,
// largest, any_above, count_above and append. Products and sums round separately (-ffp-contract=off): results equal the
// reference bit for bit.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "scalar_vec.h"

namespace distopt::cpu {
namespace {

// Whether kVecs vectors of a gradient from p on hold neither NaN nor Inf.
template <class Vec, int kVecs, class G>
inline bool finite(const G* p) {
  auto largest = Vec::key(Vec::load(p));
  for (int j = 1; j < kVecs; ++j) largest = Vec::max(largest, Vec::key(Vec::load(p + j * Vec::kWidth)));
  return !Vec::any_above(largest, kLargestFiniteKey);
}

// The key of the new v at elements i .. i + kWidth, after storing it. G is not const where the gradient is taken.
template <class Vec, Update kUpdate, class G, class S>
inline typename Vec::I step([[maybe_unused]] G* g, [[maybe_unused]] S* u, S* v,
                            [[maybe_unused]] typename Vec::F momentum, int64_t i) {
  if constexpr (kUpdate == Update::kNone) {
    return Vec::key(Vec::load(v + i));
  } else {
    const auto gi = Vec::load(g + i);
    if constexpr (!std::is_const_v<G>) Vec::zero(g + i);
    auto vi = Vec::load(v + i);
    if constexpr (kUpdate == Update::kAccumulate) {
      vi = Vec::add(vi, gi);
    } else if constexpr (kUpdate == Update::kHeavyBall) {
      const auto ui = Vec::add(Vec::mul(Vec::load(u + i), momentum), gi);
      vi = Vec::add(vi, ui);
      Vec::store(u + i, ui);
    } else {
      const auto ui = Vec::mul(Vec::add(Vec::load(u + i), gi), momentum);
      vi = Vec::add(vi, Vec::add(ui, gi));
      Vec::store(u + i, ui);
    }
    return Vec::key(Vec::store(v + i, vi));
  }
}

// Where it ended: fewer than kUnroll vectors are left, or the next ones of a gradient to be taken are not finite.
template <class Vec, int kUnroll, Update kUpdate, class G, class S>
inline int64_t run(const Job& job, int64_t begin, int64_t end, Candidates& c) {
  constexpr int64_t kStep = kUnroll * Vec::kWidth;
  static_assert(kStep <= kBlock, "a block must fit between two looks at the capacity");
  auto* g = static_cast<G*>(job.grad);
  auto* u = static_cast<S*>(job.u);
  auto* v = static_cast<S*>(job.v);
  const auto momentum = Vec::set1(job.momentum);
  const int32_t ceiling = c.ceiling;
  int32_t bound = c.bound;
  int64_t num_over_ceiling = 0;
  int64_t i = begin;
  for (; i + kStep <= end; i += kStep) {
    if constexpr (!std::is_const_v<G>) {
      if (!finite<Vec, kUnroll>(g + i)) break;
    }
    // 1. Update a block and look at its largest key: at low density most blocks end here.
    typename Vec::I key[kUnroll];
    for (int j = 0; j < kUnroll; ++j) key[j] = step<Vec, kUpdate>(g, u, v, momentum, i + j * Vec::kWidth);
    auto largest = key[0];
    for (int j = 1; j < kUnroll; ++j) largest = Vec::max(largest, key[j]);
    if (!Vec::any_above(largest, bound)) continue;
    // 2. Make room if needed, then append what is above the bound, up to the ceiling.
    if (c.count + kBlock > c.capacity) {
      make_room(c);
      bound = c.bound;
    }
    for (int j = 0; j < kUnroll; ++j) {
      const auto first = static_cast<int32_t>(i + j * Vec::kWidth);
      num_over_ceiling += Vec::count_above(key[j], ceiling);
      c.count += Vec::append(key[j], bound, ceiling, first, c.index + c.count, c.key + c.count);
    }
  }
  c.num_over_ceiling += num_over_ceiling;
  return i;
}

template <class Vec, Update kUpdate, class G, class S>
bool pass(const Job& job, int64_t begin, int64_t end, Candidates& c) {
  const int64_t done = run<Vec, 4, kUpdate, G, S>(job, begin, end, c);
  return run<ScalarVec, 1, kUpdate, G, S>(job, done, end, c) == end;
}

// The largest keys of the blocks, and the update as in pass.
template <class Vec, Update kUpdate, class G, class S>
bool maxima(const Job& job, int64_t begin, int64_t end, int32_t* largest) {
  auto* g = static_cast<G*>(job.grad);
  auto* u = static_cast<S*>(job.u);
  auto* v = static_cast<S*>(job.v);
  const auto momentum = Vec::set1(job.momentum);
  int64_t i = begin;
  for (; i + kBlock <= end; i += kBlock) {
    if constexpr (!std::is_const_v<G>) {
      if (!finite<Vec, kBlock / Vec::kWidth>(g + i)) return false;
    }
    auto most = step<Vec, kUpdate>(g, u, v, momentum, i);
    for (int64_t j = Vec::kWidth; j < kBlock; j += Vec::kWidth) {
      most = Vec::max(most, step<Vec, kUpdate>(g, u, v, momentum, i + j));
    }
    *largest++ = Vec::largest(most);
  }
  if (i == end) return true;
  if constexpr (!std::is_const_v<G>) {
    for (int64_t j = i; j < end; ++j) {
      if (!finite<ScalarVec, 1>(g + j)) return false;
    }
  }
  int32_t most = 0;
  for (; i + Vec::kWidth <= end; i += Vec::kWidth) {
    most = ScalarVec::max(most, Vec::largest(step<Vec, kUpdate>(g, u, v, momentum, i)));
  }
  for (; i < end; ++i) most = ScalarVec::max(most, step<ScalarVec, kUpdate>(g, u, v, job.momentum, i));
  *largest = most;
  return true;
}

// Calls Do::run<kUpdate, G, S> with the types that the job says; a G that is only read is const.
template <class Do, Update kUpdate, class S, class G, class... Args>
bool with_taking(const Job& job, Args&&... args) {
  if (job.take) return Do::template run<kUpdate, G, S>(job, args...);
  return Do::template run<kUpdate, const G, S>(job, args...);
}

template <class Do, Update kUpdate, class S, class... Args>
bool with_grad(const Job& job, Args&&... args) {
  switch (job.grad_dtype) {
    case DType::kFloat32:
      return with_taking<Do, kUpdate, S, float>(job, args...);
    case DType::kBFloat16:
      return with_taking<Do, kUpdate, S, BFloat16>(job, args...);
    case DType::kFloat16:
      return with_taking<Do, kUpdate, S, Float16>(job, args...);
  }
  return true;
}

template <class Do, class S, class... Args>
bool with_update(const Job& job, Args&&... args) {
  switch (job.update) {
    case Update::kNone:
      return Do::template run<Update::kNone, const float, S>(job, args...);
    case Update::kAccumulate:
      return with_grad<Do, Update::kAccumulate, S>(job, args...);
    case Update::kHeavyBall:
      return with_grad<Do, Update::kHeavyBall, S>(job, args...);
    case Update::kNesterov:
      return with_grad<Do, Update::kNesterov, S>(job, args...);
  }
  return true;
}

template <class Do, class... Args>
bool with_types(const Job& job, Args&&... args) {
  switch (job.state_dtype) {
    case DType::kFloat32:
      return with_update<Do, float>(job, args...);
    case DType::kBFloat16:
      return with_update<Do, BFloat16>(job, args...);
    case DType::kFloat16:
      return Do::template run<Update::kNone, const float, Float16>(job, args...);
  }
  return true;
}

template <class Vec>
struct Pass {
  template <Update kUpdate, class G, class S>
  static bool run(const Job& job, int64_t begin, int64_t end, Candidates& c) {
    return pass<Vec, kUpdate, G, S>(job, begin, end, c);
  }
};

template <class Vec>
bool pass_any(const Job& job, int64_t begin, int64_t end, Candidates& c) {
  return with_types<Pass<Vec>>(job, begin, end, c);
}

template <class Vec>
struct Maxima {
  template <Update kUpdate, class G, class S>
  static bool run(const Job& job, int64_t begin, int64_t end, int32_t* largest) {
    return maxima<Vec, kUpdate, G, S>(job, begin, end, largest);
  }
};

template <class Vec>
bool maxima_any(const Job& job, int64_t begin, int64_t end, int32_t* largest) {
  return with_types<Maxima<Vec>>(job, begin, end, largest);
}

// The positions of v whose key is above the bound.
template <class Vec, class S>
int64_t collect(const S* v, int64_t begin, int64_t end, int32_t bound, int32_t* indices, int64_t room) {
  int64_t kept = 0, i = begin;
  int32_t unused_keys[Vec::kWidth];
  for (; i + Vec::kWidth <= end && kept + Vec::kWidth <= room; i += Vec::kWidth) {  // append may write a whole vector
    const auto key = Vec::key(Vec::load(v + i));
    kept += Vec::append(key, bound, kNoCeiling, static_cast<int32_t>(i), indices + kept, unused_keys);
  }
  for (; i < end && kept < room; ++i) {
    const int32_t key = ScalarVec::key(ScalarVec::load(v + i));
    kept += ScalarVec::append(key, bound, kNoCeiling, static_cast<int32_t>(i), indices + kept, unused_keys);
  }
  return kept;
}

template <class Vec>
int64_t collect_any(const Job& job, int64_t begin, int64_t end, int32_t bound, int32_t* indices, int64_t room) {
  switch (job.state_dtype) {
    case DType::kFloat32:
      return collect<Vec>(static_cast<const float*>(job.v), begin, end, bound, indices, room);
    case DType::kBFloat16:
      return collect<Vec>(static_cast<const BFloat16*>(job.v), begin, end, bound, indices, room);
    case DType::kFloat16:
      return collect<Vec>(static_cast<const Float16*>(job.v), begin, end, bound, indices, room);
  }
  return 0;
}

inline int64_t count_above_any(const int32_t* keys, int64_t n, int32_t bound) {
  int32_t above = 0;
  for (int64_t i = 0; i < n; ++i) above += keys[i] > bound;
  return above;
}

// Blocks large enough to vectorise, small enough to stop early.
template <class Word>
bool all_finite(const Word* words, int64_t n, Word exponent) {
  constexpr int64_t kChunk = 4096;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = n - begin < kChunk ? n : begin + kChunk;
    Word bad = 0;
    for (int64_t i = begin; i < end; ++i) bad |= static_cast<Word>((words[i] & exponent) == exponent);
    if (bad) return false;
  }
  return true;
}

bool finite16(const uint16_t* words, int64_t n, uint16_t exponent) { return all_finite(words, n, exponent); }
bool finite32(const uint32_t* words, int64_t n) { return all_finite(words, n, uint32_t{0x7f800000}); }
bool finite64(const uint64_t* words, int64_t n) { return all_finite(words, n, uint64_t{0x7ff0000000000000}); }

}  // namespace
}  // namespace distopt::cpu
