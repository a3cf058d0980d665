// Several threads call at once, as hooks and callbacks of collectives do: each has a workspace of its own, the counters
// add up, and the path may be changed meanwhile.
#include <thread>

#include "cpu/counters.h"
#include "cpu/kernels.h"
#include "inputs.h"
#include "native_test.h"
#include "reference.h"

namespace distopt::cpu::test {

TEST(callers_at_once) {
  constexpr int kCallers = 4, kCalls = 6;
  const int64_t before = total(Counter::kSelections);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller) {
    callers.emplace_back([caller] {
      Random random(100 + caller);
      for (int i = 0; i < kCalls; ++i) {
        const int64_t n = 1000 << (2 * (i % 4));
        const Call made = call(kKinds[i % 9], n, n / (i % 2 ? 100 : 5), random);
        const Result found = with_kernels(made, some_threads(2), false);
        CHECK(difference(found, reference(made), made).empty(), std::to_string(i));
      }
    });
  }
  const int best = path();
  for (int i = 0; i < 100; ++i) set_path(i % kNumPaths);
  set_path(best);
  for (std::thread& each : callers) each.join();
  CHECK(total(Counter::kSelections) - before == kCallers * kCalls, "selections");
}

TEST(nothing_grows_in_steady_state) {
  Random random(11);
  std::vector<Call> calls;
  for (const int64_t n : {100, 5000, 70000}) {
    for (const int64_t part : {1000, 100, 4}) calls.push_back(call(Kind::kNormal, n, n / part, random));
  }
  for (const Call& each : calls) with_kernels(each, Threads(), false);
  const int64_t before = total(Counter::kWorkspaceGrowths);
  for (int round = 0; round < 20; ++round) {
    for (const Call& each : calls) with_kernels(each, Threads(), false);
  }
  CHECK(total(Counter::kWorkspaceGrowths) == before, "a workspace grew");
}

}  // namespace distopt::cpu::test
