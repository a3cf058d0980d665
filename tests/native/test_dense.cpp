// The passes over what is sent whole, on every path, against one line of arithmetic per element. The buffers are of the
// exact size, so that the sanitizer sees an access outside of them.
#include <cmath>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/dense.h"
#include "cpu/kernels.h"
#include "inputs.h"
#include "native_test.h"

namespace distopt::cpu::test {
namespace {

using Floats = std::unique_ptr<float[]>;

const Threads kThreads(3, [](int64_t num_tasks, Threads::Task task, void* context) {
  for (int64_t i = num_tasks; i-- > 0;) task(context, i);
});

Floats floats(int64_t n, Random& random) {
  Floats made(new float[n]);
  for (int64_t i = 0; i < n; ++i) made[i] = draw(i % 5 ? Kind::kNormal : Kind::kWide, i, n, random);
  return made;
}

Floats copy(const Floats& from, int64_t n) {
  Floats made(new float[n]);
  std::copy_n(from.get(), n, made.get());
  return made;
}

bool same(const Floats& a, const Floats& b, int64_t n) { return std::memcmp(a.get(), b.get(), n * sizeof(float)) == 0; }

float element(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return load(static_cast<const float*>(p) + i);
  return dtype == DType::kBFloat16 ? load(static_cast<const BFloat16*>(p) + i)
                                   : load(static_cast<const Float16*>(p) + i);
}

void on_every_path(const std::function<void(int64_t n, const Threads& threads)>& test) {
  const int before = path();
  for (int candidate = 0; candidate < kNumPaths; ++candidate) {
    if (!set_path(candidate)) continue;
    for (int64_t n = 0; n < 70; ++n) test(n, {});
    for (const int64_t n : {4095, 4096, 4100, 8192 + 17}) test(n, {});
    test(200001, kThreads);
  }
  set_path(before);
}

}  // namespace

TEST(scaling_says_what_is_finite) {
  Random random(21);
  on_every_path([&](int64_t n, const Threads& threads) {
    const Floats x = floats(n, random);
    const Floats scaled = copy(x, n);
    CHECK(scale(scaled.get(), n, 0.25f, threads), std::to_string(n));
    for (int64_t i = 0; i < n; ++i) CHECK(scaled[i] == x[i] * 0.25f, std::to_string(i));
    if (n == 0) return;
    for (const float bad : {INFINITY, -INFINITY, NAN, -NAN}) {
      const Floats broken = copy(x, n);
      const int64_t at = static_cast<int64_t>(random() % n);
      broken[at] = bad;
      CHECK(!scale(broken.get(), n, 0.25f, threads), std::to_string(at));
      CHECK(!std::isfinite(broken[at]), std::to_string(at));
    }
  });
}

TEST(momentum_steps) {
  Random random(22);
  on_every_path([&](int64_t n, const Threads& threads) {
    for (const bool nesterov : {false, true}) {
      const Floats g = floats(n, random), u = floats(n, random);
      const Floats want_g = copy(g, n), want_u = copy(u, n);
      for (int64_t i = 0; i < n; ++i) {
        want_u[i] = nesterov ? (u[i] + g[i]) * 0.9f : u[i] * 0.9f + g[i];
        want_g[i] = nesterov ? want_u[i] + g[i] : want_u[i];
      }
      momentum(g.get(), u.get(), n, 0.9f, nesterov, threads);
      CHECK(same(g, want_g, n) && same(u, want_u, n), std::to_string(n));
    }
  });
}

TEST(decay_steps) {
  Random random(23);
  on_every_path([&](int64_t n, const Threads& threads) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (const bool nesterov : {false, true}) {
        const Floats x = floats(n, random), d = floats(n, random);
        const Floats want_x = copy(x, n), want_d = copy(d, n);
        const auto p = tensor(Kind::kNormal, dtype, n, random);
        for (int64_t i = 0; i < n; ++i) {
          const float added = element(p.data(), dtype, i) * 0.01f;
          want_d[i] = nesterov ? (d[i] + added) * 0.9f : d[i] * 0.9f + added;
          want_x[i] = nesterov ? x[i] + want_d[i] + added : x[i] + want_d[i];
        }
        decay({x.get(), d.get(), p.data(), dtype, 0.01f, 0.9f, nesterov}, n, threads);
        CHECK(same(x, want_x, n) && same(d, want_d, n), std::to_string(n));
      }
    }
  });
}

TEST(weighted_sums) {
  Random random(24);
  on_every_path([&](int64_t n, const Threads& threads) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (const int64_t num_rows : {1, 3, 4, 6, 8, 13, 21}) {
        std::vector<decltype(tensor(Kind::kNormal, dtype, n, random))> rows;
        std::vector<const void*> data;
        std::vector<float> weights;
        const Floats out = floats(n, random), want = floats(n, random);
        for (int64_t r = 0; r < num_rows; ++r) {
          rows.push_back(tensor(Kind::kNormal, dtype, n, random));
          data.push_back(rows.back().data());
          weights.push_back(0.3f * static_cast<float>(r) - 0.7f);
          for (int64_t i = 0; i < n; ++i) {
            const float added = element(data.back(), dtype, i) * weights.back();
            want[i] = r == 0 ? added : want[i] + added;
          }
        }
        weighted_sum({out.get(), data.data(), weights.data(), num_rows, dtype}, n, threads);
        CHECK(same(out, want, n), std::to_string(n) + " elements, " + std::to_string(num_rows) + " rows");
      }
    }
  });
}

}  // namespace distopt::cpu::test
