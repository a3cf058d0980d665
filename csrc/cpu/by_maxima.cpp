#include <algorithm>
#include <atomic>

#include "kernels.h"
#include "parts.h"
#include "selection.h"
#include "workspace.h"

namespace distopt::cpu {

bool select_by_maxima(const Job& job, int64_t n, int64_t k, const Threads& threads, int32_t* indices) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  const int64_t capacity = std::min(n, 3 * k + 512) + kBlock;
  Workspace& workspace = Workspace::of_this_thread();
  int32_t* largest = workspace.largest.reserve(blocks);
  // 1. The pass that updates keeps the largest key of each block.
  const Parts parts(n, threads);
  std::atomic<bool> finite{true};
  threads.each(parts.count, [&](int64_t part) {
    const int64_t begin = parts.begin(part);
    if (!kernels().maxima(job, begin, parts.end(part), largest + begin / kBlock)) finite = false;
  });
  if (!finite) return false;
  // 2. The k-th largest of them: at least k keys are as large.
  Candidates c{workspace.index.reserve(capacity), workspace.key.reserve(capacity), capacity, k,
               threshold(largest, blocks, k).bound()};
  // 3. Candidates from the blocks that hold any. Where ties fill the buffer, a cut raises the bound.
  Job again = job;
  again.update = Update::kNone;
  const auto pass = kernels().pass;
  for (int64_t block = 0; block < blocks; ++block) {
    if (largest[block] > c.bound) pass(again, block * kBlock, std::min(n, (block + 1) * kBlock), c);
  }
  // 4. The k best among them.
  if (c.count > k) cut(c);
  std::copy_n(c.index, k, indices);
  return true;
}

}  // namespace distopt::cpu
