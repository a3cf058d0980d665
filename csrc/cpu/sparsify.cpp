#include "sparsify.h"

#include "counters.h"
#include "parts.h"
#include "selection.h"

namespace distopt::cpu {
namespace {

template <class T>
void gather(const T* v, const int32_t* indices, int64_t k, T* values) {
  for (int64_t i = 0; i < k; ++i) values[i] = v[indices[i]];
}

template <class S>
void take_out(S* v, S* u, const int32_t* indices, int64_t k, float* values) {
  for (int64_t i = 0; i < k; ++i) {
    const int32_t at = indices[i];
    values[i] = load(v + at);
    v[at] = S{};
    if (u) u[at] = S{};
  }
}

}  // namespace

bool sparsify(const Job& job, int64_t n, int64_t k, bool masking, const Threads& threads, void* values,
              int32_t* indices) {
  if (!select(job, n, k, threads, indices)) return false;
  count(Counter::kSelections, k > 0);
  void* u = masking ? job.u : nullptr;
  const Parts parts(k, threads);
  threads.each(parts.count, [&](int64_t part) {
    const int64_t first = parts.begin(part), num = parts.end(part) - first;
    const bool wide = job.state_dtype == DType::kFloat32;
    auto* out = static_cast<float*>(values);
    if (job.update != Update::kNone && wide) {
      take_out(static_cast<float*>(job.v), static_cast<float*>(u), indices + first, num, out + first);
    } else if (job.update != Update::kNone) {
      take_out(static_cast<BFloat16*>(job.v), static_cast<BFloat16*>(u), indices + first, num, out + first);
    } else if (wide) {
      gather(static_cast<const uint32_t*>(job.v), indices + first, num, static_cast<uint32_t*>(values) + first);
    } else {
      gather(static_cast<const uint16_t*>(job.v), indices + first, num, static_cast<uint16_t*>(values) + first);
    }
  });
  return true;
}

}  // namespace distopt::cpu
