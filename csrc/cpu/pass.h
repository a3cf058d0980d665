// The fused pass over a tensor, written once over a vector type Vec: update u and v, rank the new v, keep the
// candidates.
//
// Included by each kernels_*.cpp after its Vec, inside the reach of its target options; everything here is local to
// that file. Vec gives kWidth lanes, load, store (returns what the memory now holds), add, mul, set1, key, max,
// largest, any_above, count_above and append. Products and sums round separately (-ffp-contract=off): results equal the
// reference bit for bit.
#pragma once

#include "kernels.h"
#include "scalar_vec.h"

namespace distopt::cpu {
namespace {

// The key of the new v at elements i .. i + kWidth, after storing it.
template <class Vec, Update kUpdate, class G, class S>
inline typename Vec::I step([[maybe_unused]] const G* g, [[maybe_unused]] S* u, S* v,
                            [[maybe_unused]] typename Vec::F momentum, int64_t i) {
  if constexpr (kUpdate == Update::kNone) {
    return Vec::key(Vec::load(v + i));
  } else {
    const auto gi = Vec::load(g + i);
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

template <class Vec, int kUnroll, Update kUpdate, class G, class S>
inline int64_t run(const Job& job, int64_t begin, int64_t end, Candidates& c) {
  constexpr int64_t kStep = kUnroll * Vec::kWidth;
  static_assert(kStep <= kBlock, "a block must fit between two looks at the capacity");
  const auto* g = static_cast<const G*>(job.grad);
  auto* u = static_cast<S*>(job.u);
  auto* v = static_cast<S*>(job.v);
  const auto momentum = Vec::set1(job.momentum);
  const int32_t ceiling = c.ceiling;
  int32_t bound = c.bound;
  int64_t num_over_ceiling = 0;
  int64_t i = begin;
  for (; i + kStep <= end; i += kStep) {
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
void pass(const Job& job, int64_t begin, int64_t end, Candidates& c) {
  const int64_t done = run<Vec, 4, kUpdate, G, S>(job, begin, end, c);
  run<ScalarVec, 1, kUpdate, G, S>(job, done, end, c);
}

// The largest keys of the blocks, and the update as in pass.
template <class Vec, Update kUpdate, class G, class S>
void maxima(const Job& job, int64_t begin, int64_t end, int32_t* largest) {
  const auto* g = static_cast<const G*>(job.grad);
  auto* u = static_cast<S*>(job.u);
  auto* v = static_cast<S*>(job.v);
  const auto momentum = Vec::set1(job.momentum);
  int64_t i = begin;
  for (; i + kBlock <= end; i += kBlock) {
    auto most = step<Vec, kUpdate>(g, u, v, momentum, i);
    for (int64_t j = Vec::kWidth; j < kBlock; j += Vec::kWidth) {
      most = Vec::max(most, step<Vec, kUpdate>(g, u, v, momentum, i + j));
    }
    *largest++ = Vec::largest(most);
  }
  if (i == end) return;
  int32_t most = 0;
  for (; i + Vec::kWidth <= end; i += Vec::kWidth) {
    most = ScalarVec::max(most, Vec::largest(step<Vec, kUpdate>(g, u, v, momentum, i)));
  }
  for (; i < end; ++i) most = ScalarVec::max(most, step<ScalarVec, kUpdate>(g, u, v, job.momentum, i));
  *largest = most;
}

// Calls Do::run<kUpdate, G, S> with the types that the job says.
template <class Do, Update kUpdate, class S, class... Args>
void with_grad(const Job& job, Args&&... args) {
  switch (job.grad_dtype) {
    case DType::kFloat32:
      return Do::template run<kUpdate, float, S>(job, args...);
    case DType::kBFloat16:
      return Do::template run<kUpdate, BFloat16, S>(job, args...);
    case DType::kFloat16:
      return Do::template run<kUpdate, Float16, S>(job, args...);
  }
}

template <class Do, class S, class... Args>
void with_update(const Job& job, Args&&... args) {
  switch (job.update) {
    case Update::kNone:
      return Do::template run<Update::kNone, float, S>(job, args...);
    case Update::kAccumulate:
      return with_grad<Do, Update::kAccumulate, S>(job, args...);
    case Update::kHeavyBall:
      return with_grad<Do, Update::kHeavyBall, S>(job, args...);
    case Update::kNesterov:
      return with_grad<Do, Update::kNesterov, S>(job, args...);
  }
}

template <class Do, class... Args>
void with_types(const Job& job, Args&&... args) {
  switch (job.state_dtype) {
    case DType::kFloat32:
      return with_update<Do, float>(job, args...);
    case DType::kBFloat16:
      return with_update<Do, BFloat16>(job, args...);
    case DType::kFloat16:
      return Do::template run<Update::kNone, float, Float16>(job, args...);
  }
}

template <class Vec>
struct Pass {
  template <Update kUpdate, class G, class S>
  static void run(const Job& job, int64_t begin, int64_t end, Candidates& c) {
    pass<Vec, kUpdate, G, S>(job, begin, end, c);
  }
};

template <class Vec>
void pass_any(const Job& job, int64_t begin, int64_t end, Candidates& c) {
  with_types<Pass<Vec>>(job, begin, end, c);
}

template <class Vec>
struct Maxima {
  template <Update kUpdate, class G, class S>
  static void run(const Job& job, int64_t begin, int64_t end, int32_t* largest) {
    maxima<Vec, kUpdate, G, S>(job, begin, end, largest);
  }
};

template <class Vec>
void maxima_any(const Job& job, int64_t begin, int64_t end, int32_t* largest) {
  with_types<Maxima<Vec>>(job, begin, end, largest);
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
