#include "segments.h"

#include <algorithm>
#include <numeric>

#include "dtypes.h"
#include "parts.h"
#include "sparsify.h"

namespace distopt::cpu {
namespace {

// Elements from which on a segment is worth dividing among threads; shorter ones are given to one thread each.
constexpr int64_t kDivide = 1 << 18;

int64_t bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Walks along the table, and knows where the states and the results of the segment at hand are.
struct Cursor {
  const Segment* segment = nullptr;
  int64_t state = 0;
  int64_t taken = 0;

  void next() {
    state += segment->numel;
    taken += segment->k;
    ++segment;
  }
};

Job job_of(const Job& whole, const Cursor& at) {
  Job job = whole;
  const int64_t state_bytes = at.state * bytes(whole.state_dtype);
  job.grad = static_cast<char*>(whole.grad) + at.segment->start * bytes(whole.grad_dtype);
  job.v = static_cast<char*>(whole.v) + state_bytes;
  if (whole.u) job.u = static_cast<char*>(whole.u) + state_bytes;
  return job;
}

bool sparsify_one(const Job& whole, const Cursor& at, bool masking, const Threads& threads, float* values,
                  int32_t* indices) {
  const Segment& segment = *at.segment;
  int32_t* positions = indices + at.taken;
  if (!sparsify(job_of(whole, at), segment.numel, segment.k, masking, threads, values + at.taken, positions)) {
    return false;
  }
  const auto start = static_cast<int32_t>(segment.start);
  for (int64_t i = 0; i < segment.k; ++i) positions[i] += start;
  return true;
}

template <class S>
void put_back(S* v, const Cursor& at, const float* values, const int32_t* indices) {
  const int64_t offset = at.state - at.segment->start;
  for (int64_t i = at.taken; i < at.taken + at.segment->k; ++i) store(v + (indices[i] + offset), values[i]);
}

// Undoes the selection, not the update, of the segments in [at, end).
void put_back(const Job& job, Cursor at, const Segment* end, const float* values, const int32_t* indices) {
  for (; at.segment < end; at.next()) {
    if (job.state_dtype == DType::kFloat32) {
      put_back(static_cast<float*>(job.v), at, values, indices);
    } else {
      put_back(static_cast<BFloat16*>(job.v), at, values, indices);
    }
  }
}

}  // namespace

Problem check(const Segment* segments, int64_t num_segments, int64_t grad_numel, int64_t state_numel, int64_t count) {
  int64_t end = 0, covered = 0, selected = 0;  // none can overflow: a row that passed is inside grad
  for (int64_t row = 0; row < num_segments; ++row) {
    const auto& [start, numel, k] = segments[row];
    if (start < end || start > grad_numel || numel < 0 || numel > grad_numel - start) {
      return {"segments must be ascending, apart and inside grad", row};
    }
    if (k < 0 || k > numel) return {"k of a segment must be in [0, numel]", row};
    end = start + numel;
    covered += numel;
    selected += k;
  }
  if (covered != state_numel) return {"the states must have as many entries as the segments", -1};
  if (selected != count) return {"count must be the sum of all k", -1};
  return {nullptr, -1};
}

int64_t sparsify_segments(const Job& job, const Segment* segments, int64_t num_segments, bool masking,
                          const Threads& threads, float* values, int32_t* indices) {
  const Segment* const last = segments + num_segments;
  const Segment* bad = nullptr;
  Cursor at{segments};
  while (at.segment < last && bad == nullptr) {
    if (at.segment->numel >= kDivide) {
      if (sparsify_one(job, at, masking, threads, values, indices)) {
        at.next();
      } else {
        bad = at.segment;
      }
      continue;
    }
    // A run of small segments: each part takes those whose states begin in its share of the run's.
    Cursor end = at;
    while (end.segment < last && end.segment->numel < kDivide) end.next();
    const Parts parts(end.state - at.state, threads);
    Cursor began[Parts::kMost];
    const Segment* stopped[Parts::kMost];
    bool good[Parts::kMost];
    threads.each(parts.count, [&](int64_t part) {
      const int64_t from = at.state + parts.begin(part), to = at.state + parts.end(part);
      Cursor own = at;
      while (own.segment < end.segment && own.state < from) own.next();
      began[part] = own;
      good[part] = true;
      for (; own.segment < end.segment && (own.state < to || part + 1 == parts.count); own.next()) {
        good[part] = sparsify_one(job, own, masking, Threads(), values, indices);
        if (!good[part]) break;
      }
      stopped[part] = own.segment;
    });
    // Each part went on to the first of its own that is not finite: the first of the first part is the first of all.
    const int64_t first = std::find(good, good + parts.count, false) - good;
    if (first == parts.count) {
      at = end;
      continue;
    }
    bad = stopped[first];
    for (int64_t part = 0; part < parts.count; ++part) put_back(job, began[part], stopped[part], values, indices);
  }
  if (bad == nullptr) return -1;
  put_back(job, Cursor{segments}, at.segment, values, indices);
  int64_t count = 0;
  for (int64_t row = 0; row < num_segments; ++row) count += segments[row].k;
  std::fill_n(values, count, 0.0f);
  std::iota(indices, indices + count, 0);
  return bad - segments;
}

}  // namespace distopt::cpu
