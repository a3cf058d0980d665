#include "interleaved.h"

#include <algorithm>
#include <cmath>

#include "counters.h"
#include "job.h"
#include "kernels.h"
#include "sample.h"
#include "select.h"
#include "workspace.h"

namespace distopt::cpu {
namespace {

constexpr int64_t kLeastChunk = 1 << 13;  // elements whose candidates are dealt out while they are in a near cache

// The candidates of each owner in a row of its own; their indices count within the class.
class Owners {
 public:
  Owners(int64_t n, int64_t k, int64_t num_owners, Workspace& workspace)
      : k_(k),
        num_(num_owners),
        capacity_(std::min(n / num_owners + 1, 8 * k + 256)),
        chunk_(std::max(kLeastChunk, num_owners)) {
    index_ = workspace.index.reserve(num_ * capacity_ + chunk_ + kBlock);
    key_ = workspace.key.reserve(num_ * capacity_ + chunk_ + kBlock);
    count_ = workspace.largest.reserve(2 * num_);
    bound_ = count_ + num_;
  }

  // Elements between two looks at the bounds: not fewer than the bounds, so that looking costs no more than reading.
  int64_t chunk() const { return chunk_; }

  // Where a chunk's candidates wait, behind the rows. It holds all of a chunk, so it is never full.
  Candidates waiting(int32_t bound) const {
    return {index_ + num_ * capacity_, key_ + num_ * capacity_, chunk_ + kBlock, 1, bound};
  }

  void start(int32_t bound) {
    std::fill_n(count_, num_, 0);
    std::fill_n(bound_, num_, bound);
  }

  // Whether the least of the bounds may have changed.
  bool deal(const Candidates& c) {
    const auto num = static_cast<uint32_t>(num_);
    bool cut_some = false;
    for (int64_t i = 0; i < c.count; ++i) {
      const auto position = static_cast<uint32_t>(c.index[i]);
      const uint32_t owner = position % num;
      if (c.key[i] <= bound_[owner]) continue;
      if (count_[owner] == capacity_) {
        count(Counter::kFullBuffers);
        cut_row(owner);
        cut_some = true;
        if (c.key[i] <= bound_[owner]) continue;
      }
      const int64_t at = owner * capacity_ + count_[owner]++;
      index_[at] = static_cast<int32_t>(position / num);
      key_[at] = c.key[i];
    }
    return cut_some;
  }

  int32_t least_bound() const { return *std::min_element(bound_, bound_ + num_); }

  bool all_have_enough() const { return *std::min_element(count_, count_ + num_) >= k_; }

  // The k best of each, into rows of k.
  void finish(int32_t* indices) {
    for (int64_t owner = 0; owner < num_; ++owner) {
      if (count_[owner] > k_) cut_row(owner);
      std::copy_n(index_ + owner * capacity_, k_, indices + owner * k_);
    }
  }

 private:
  void cut_row(int64_t owner) {
    Candidates c{index_ + owner * capacity_, key_ + owner * capacity_, capacity_, k_, bound_[owner]};
    c.count = count_[owner];
    cut(c);
    count_[owner] = static_cast<int32_t>(c.count);
    bound_[owner] = c.bound;
  }

  int64_t k_, num_, capacity_, chunk_;
  int32_t *index_, *key_, *count_, *bound_;
};

void collect(const Job& job, int64_t n, int32_t bound, Owners& owners) {
  const auto pass = kernels().pass;
  owners.start(bound);
  for (int64_t begin = 0; begin < n; begin += owners.chunk()) {
    Candidates c = owners.waiting(bound);
    pass(job, begin, std::min(n, begin + owners.chunk()), c);
    if (owners.deal(c)) bound = owners.least_bound();
  }
}

template <class T>
void gather(const T* x, int64_t k, int64_t num_owners, const int32_t* indices, T* values) {
  for (int64_t owner = 0; owner < num_owners; ++owner) {
    for (int64_t i = owner * k; i < (owner + 1) * k; ++i) values[i] = x[indices[i] * num_owners + owner];
  }
}

// How many of all have to pass so that a class with k expected in its share has at least k, but for one call in a
// million or so: five standard deviations, and some for the small k where the counts are skewed.
int64_t wanted(int64_t n, int64_t k, int64_t num_owners) {
  const double each = static_cast<double>(k) + 5 * std::sqrt(static_cast<double>(k)) + 10;
  return std::min(n, static_cast<int64_t>(each) * num_owners);
}

}  // namespace

void topk_interleaved(const void* x, DType dtype, int64_t n, int64_t k, int64_t num_owners, void* values,
                      int32_t* indices) {
  if (k == 0) return;
  const Job job{Update::kNone, dtype, dtype, nullptr, nullptr, const_cast<void*>(x), 0.0f};  // kNone only reads v
  count(Counter::kSelections);
  Workspace& workspace = Workspace::of_this_thread();
  const int64_t enough = wanted(n, k, num_owners);
  int32_t bound = kAcceptAll;
  if (const int64_t samples = sample_size(n, enough)) {
    int32_t* keys = workspace.key.reserve(samples);
    sample_keys(job, n, keys, samples, Threads());
    bound = bound_from_sample(keys, samples, n, enough);
  }
  Owners owners(n, k, num_owners, workspace);  // after the sample, whose memory it takes over
  collect(job, n, bound, owners);
  if (!owners.all_have_enough()) {
    count(Counter::kSecondCollections);
    collect(job, n, kAcceptAll, owners);
  }
  owners.finish(indices);
  if (dtype == DType::kFloat32) {
    gather(static_cast<const uint32_t*>(x), k, num_owners, indices, static_cast<uint32_t*>(values));
  } else {
    gather(static_cast<const uint16_t*>(x), k, num_owners, indices, static_cast<uint16_t*>(values));
  }
}

}  // namespace distopt::cpu
