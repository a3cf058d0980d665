#include "reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/sparsify.h"
#include "native_test.h"

namespace distopt::cpu::test {
namespace {

float element(const uint8_t* data, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) {
    float x;
    std::memcpy(&x, data + 4 * i, 4);
    return x;
  }
  uint16_t bits;
  std::memcpy(&bits, data + 2 * i, 2);
  const BFloat16 brain{bits};
  const Float16 half{bits};
  return dtype == DType::kBFloat16 ? load(&brain) : load(&half);
}

void set_element(uint8_t* data, DType dtype, int64_t i, float x) {
  if (dtype == DType::kFloat32) {
    std::memcpy(data + 4 * i, &x, 4);
    return;
  }
  BFloat16 brain;
  store(&brain, x);
  std::memcpy(data + 2 * i, &brain.bits, 2);
}

// Larger for what ranks before: NaN above infinity.
double rank_of(float x) {
  if (std::isnan(x)) return 2e300;
  return std::isinf(x) ? 1e300 : std::fabs(x);
}

bool same(const std::vector<uint8_t>& a, const std::vector<uint8_t>& b, DType dtype) {
  if (a.size() != b.size()) return false;
  for (int64_t i = 0; i < static_cast<int64_t>(a.size()) / size_of(dtype); ++i) {
    const int64_t size = size_of(dtype);
    if (std::memcmp(&a[i * size], &b[i * size], size) == 0) continue;
    if (!std::isnan(element(a.data(), dtype, i)) || !std::isnan(element(b.data(), dtype, i))) return false;
  }
  return true;
}

// A copy of its own on the heap, without the spare room of a vector.
struct Exact {
  explicit Exact(const std::vector<uint8_t>& bytes) : Exact(bytes.size()) {
    if (size) std::memcpy(data.get(), bytes.data(), size);
  }
  explicit Exact(size_t size) : data(new uint8_t[size]), size(size) {}
  std::vector<uint8_t> bytes() const { return {data.get(), data.get() + size}; }

  std::unique_ptr<uint8_t[]> data;
  size_t size;
};

}  // namespace

int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

Job Call::job() {
  return {update, grad_dtype, state_dtype, grad.data(), u.empty() ? nullptr : u.data(), v.data(), momentum, take};
}

int64_t Call::numel_of_state() const { return static_cast<int64_t>(v.size()) / size_of(state_dtype); }

int64_t Call::count() const {
  int64_t sum = 0;
  for (const Segment& segment : segments) sum += segment.k;
  return sum;
}

std::vector<int32_t> largest(const std::vector<uint8_t>& x, DType dtype, int64_t first, int64_t step, int64_t n,
                             int64_t k) {
  std::vector<std::pair<double, int32_t>> order;
  for (int64_t i = first; i < n; i += step) {
    order.emplace_back(-rank_of(element(x.data(), dtype, i)), static_cast<int32_t>(order.size()));
  }
  if (k < static_cast<int64_t>(order.size())) std::nth_element(order.begin(), order.begin() + k, order.end());
  std::vector<int32_t> found;
  for (int64_t i = 0; i < k; ++i) found.push_back(order[i].second);
  std::sort(found.begin(), found.end());
  return found;
}

Result reference(Call call) {
  Result result;
  int64_t at = 0;
  const DType dtype = call.state_dtype;
  for (const auto& [start, numel, k] : call.segments) {
    for (int64_t i = 0; i < numel && call.update != Update::kNone; ++i) {
      const float g = element(call.grad.data(), call.grad_dtype, start + i);
      float v = element(call.v.data(), dtype, at + i), u = 0;
      if (call.update != Update::kAccumulate) u = element(call.u.data(), dtype, at + i);
      if (call.update == Update::kAccumulate) {
        v = v + g;
      } else if (call.update == Update::kHeavyBall) {
        u = u * call.momentum + g;
        v = v + u;
      } else {
        u = (u + g) * call.momentum;
        v = v + (u + g);
      }
      set_element(call.v.data(), dtype, at + i, v);
      if (call.update != Update::kAccumulate) set_element(call.u.data(), dtype, at + i, u);
    }
    const std::vector<uint8_t> own(call.v.begin() + at * size_of(dtype),
                                   call.v.begin() + (at + numel) * size_of(dtype));
    for (const int32_t i : largest(own, dtype, 0, 1, numel, k)) {
      result.indices.push_back(static_cast<int32_t>(start) + i);
      const uint8_t* bytes = &own[i * size_of(dtype)];
      if (call.update == Update::kNone) {
        result.values.insert(result.values.end(), bytes, bytes + size_of(dtype));
        continue;
      }
      const float value = element(own.data(), dtype, i);
      result.values.resize(result.values.size() + 4);
      std::memcpy(&*(result.values.end() - 4), &value, 4);
      set_element(call.v.data(), dtype, at + i, 0);
      if (call.masking && !call.u.empty()) set_element(call.u.data(), dtype, at + i, 0);
    }
    if (call.take)
      std::memset(call.grad.data() + start * size_of(call.grad_dtype), 0, numel * size_of(call.grad_dtype));
    at += numel;
  }
  result.grad = call.grad;
  result.u = call.u;
  result.v = call.v;
  return result;
}

int64_t first_bad(const Call& call) {
  for (size_t row = 0; row < call.segments.size(); ++row) {
    const auto& [start, numel, k] = call.segments[row];
    for (int64_t i = start; i < start + numel; ++i) {
      if (!std::isfinite(element(call.grad.data(), call.grad_dtype, i))) return static_cast<int64_t>(row);
    }
  }
  return -1;
}

void make_finite(Call& call) {
  for (const auto& [start, numel, k] : call.segments) {
    for (int64_t i = start; i < start + numel; ++i) {
      if (std::isfinite(element(call.grad.data(), call.grad_dtype, i))) continue;
      uint8_t* bytes = &call.grad[i * size_of(call.grad_dtype)];
      bytes[size_of(call.grad_dtype) - 1] &= 0xbf;  // the highest bit of the exponent
    }
  }
}

Result with_kernels(Call call, const Threads& threads, bool as_segments) {
  const Exact grad(call.grad), u(call.u), v(call.v);
  const int64_t k = call.count();
  const bool plain = call.update == Update::kNone;
  const Exact values(k * (plain ? size_of(call.state_dtype) : 4)), indices(k * 4);
  Job job = call.job();
  job.grad = grad.data.get();
  job.u = call.u.empty() ? nullptr : u.data.get();
  job.v = v.data.get();
  auto* positions = reinterpret_cast<int32_t*>(indices.data.get());
  int64_t bad = -1;
  if (as_segments) {
    bad = sparsify_segments(job, call.segments.data(), static_cast<int64_t>(call.segments.size()), call.masking,
                            threads, reinterpret_cast<float*>(values.data.get()), positions);
  } else if (!sparsify(job, call.segments[0].numel, k, call.masking, threads, values.data.get(), positions)) {
    bad = 0;
  }
  return {grad.bytes(), u.bytes(), v.bytes(), values.bytes(), {positions, positions + k}, bad};
}

std::string difference(const Result& a, const Result& b, const Call& call) {
  if (a.indices != b.indices) return "indices";
  const bool plain = call.update == Update::kNone;
  if (!same(a.values, b.values, plain ? call.state_dtype : DType::kFloat32)) return "values";
  if (!same(a.v, b.v, call.state_dtype)) return "v";
  if (!same(a.u, b.u, call.state_dtype)) return "u";
  if (a.grad != b.grad) return "grad";
  if (a.bad != b.bad) return "bad";
  return "";
}

std::string flaw_of_refusal(const Result& found, const Call& call) {
  const int64_t bad = first_bad(call), count = call.count();
  if (found.bad != bad) return "bad is " + std::to_string(found.bad) + ", not " + std::to_string(bad);
  if (found.values != std::vector<uint8_t>(4 * count)) return "values";
  for (int64_t i = 0; i < count; ++i) {
    if (found.indices[i] != i) return "indices";
  }
  Call left = call;
  left.grad = found.grad;
  if (first_bad(left) != bad) return "what names the segment is gone";
  // 1. Each entry of v is as it was, or as the update alone makes it.
  Call updated = call;
  updated.take = false;
  for (Segment& segment : updated.segments) segment.k = 0;
  const Result after = reference(updated);
  int64_t state = 0;
  std::vector<bool> inside(call.grad.size() / size_of(call.grad_dtype));
  for (const auto& [start, numel, k] : call.segments) {
    for (int64_t i = 0; i < numel; ++i, ++state) {
      inside[start + i] = true;
      const float g = element(call.grad.data(), call.grad_dtype, start + i);
      const auto is = [&](const std::vector<uint8_t>& a, const std::vector<uint8_t>& b) {
        const float x = element(a.data(), call.state_dtype, state), y = element(b.data(), call.state_dtype, state);
        return x == y || (std::isnan(x) && std::isnan(y));
      };
      if (!is(found.v, call.v) && !(std::isfinite(g) && is(found.v, after.v))) return "v";
      // 2. And u, or masked.
      if (call.u.empty() || (call.masking && element(found.u.data(), call.state_dtype, state) == 0)) continue;
      if (!is(found.u, call.u) && !(std::isfinite(g) && is(found.u, after.u))) return "u";
    }
  }
  // 3. Outside the segments the gradient is as it was.
  const int64_t size = size_of(call.grad_dtype);
  for (size_t i = 0; i < inside.size(); ++i) {
    if (!inside[i] && std::memcmp(&call.grad[i * size], &found.grad[i * size], size) != 0) return "outside";
  }
  return "";
}

void check_everywhere(const Call& call) {
  const bool refused = call.take && first_bad(call) >= 0;
  const Result expected = refused ? Result() : reference(call);
  const int before = path();
  const bool single = call.segments.size() == 1 && call.segments[0].start == 0;
  for (int candidate = 0; candidate < kNumPaths; ++candidate) {
    if (!set_path(candidate)) continue;
    for (const int64_t num_threads : {1, 2, 3}) {
      for (const bool as_segments : {false, true}) {
        if (as_segments ? call.update == Update::kNone : !single) continue;
        const Result found = with_kernels(call, some_threads(num_threads), as_segments);
        if (refused && !as_segments) {
          CHECK(found.bad == 0, "accepted on path " + std::to_string(candidate));
          continue;
        }
        const std::string what = refused ? flaw_of_refusal(found, call) : difference(found, expected, call);
        CHECK(what.empty(), what + " differ on path " + std::to_string(candidate) + ", " + std::to_string(num_threads) +
                                " threads, n " + std::to_string(call.numel_of_state()) + ", k " +
                                std::to_string(call.count()) + ", update " +
                                std::to_string(static_cast<int>(call.update)));
      }
    }
  }
  set_path(before);
}

Threads some_threads(int64_t count) {
  return {count, [](int64_t num_tasks, Threads::Task task, void* context) {
            std::vector<std::thread> pool;
            for (int64_t i = 1; i < num_tasks; ++i) pool.emplace_back(task, context, i);
            task(context, 0);
            for (std::thread& each : pool) each.join();
          }};
}

}  // namespace distopt::cpu::test
