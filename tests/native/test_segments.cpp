// Many tensors in one call: what each would give alone; and tables that would lead outside memory are refused.
#include <limits>
#include <set>

#include "inputs.h"
#include "native_test.h"
#include "reference.h"

namespace distopt::cpu::test {
namespace {

// Segments with gaps between, of 0 to `longest` entries.
Call bucket(Kind kind, int64_t num_segments, int64_t longest, Random& random) {
  Call made = call(kind, 0, 0, random);
  while (made.update == Update::kNone) made = call(kind, 0, 0, random);
  made.segments.clear();
  int64_t end = 0, covered = 0;
  for (int64_t i = 0; i < num_segments; ++i) {
    const auto gap = static_cast<int64_t>(random() % 3), numel = static_cast<int64_t>(random() % (longest + 1));
    const int64_t k = random() % 2 ? (numel + 99) / 100 : static_cast<int64_t>(random() % (numel + 1));
    made.segments.push_back({end + gap, numel, k});
    end += gap + numel;
    covered += numel;
  }
  made.grad = tensor(kind, made.grad_dtype, end, random);
  made.v = tensor(kind, made.state_dtype, covered, random);
  made.u.clear();
  if (made.update != Update::kAccumulate) made.u = tensor(Kind::kNormal, made.state_dtype, covered, random);
  return made;
}

}  // namespace

TEST(segments_as_alone) {
  Random random(7);
  for (const Kind kind : kKinds) {
    for (int round = 0; round < 4; ++round) {
      check_everywhere(bucket(kind, static_cast<int64_t>(random() % 12), 300, random));
    }
    check_everywhere(bucket(kind, 5, 9000, random));
  }
}

TEST(small_and_large_segments_with_threads) {
  Random random(8);
  Call made = bucket(Kind::kNormal, 300, 1000, random);
  Call large = bucket(Kind::kNormal, 2, 280000, random);
  check_everywhere(made);
  check_everywhere(large);
  // Small ones around one that is divided among the threads.
  Call both = bucket(Kind::kTies, 100, 2000, random);
  const Segment& last = both.segments.back();
  both.segments.push_back({last.start + last.numel, 300000, 300});
  both.segments.push_back({last.start + last.numel + 300000, 5, 5});
  const int64_t grad_numel = both.segments.back().start + 5;
  both.grad = tensor(Kind::kNormal, both.grad_dtype, grad_numel, random);
  int64_t covered = 0;
  for (const Segment& segment : both.segments) covered += segment.numel;
  both.v = tensor(Kind::kNormal, both.state_dtype, covered, random);
  if (!both.u.empty()) both.u = tensor(Kind::kNormal, both.state_dtype, covered, random);
  check_everywhere(both);
}

TEST(a_gradient_is_taken) {
  Random random(13);
  for (const Kind kind : kKinds) {
    for (int round = 0; round < 4; ++round) {
      Call made = bucket(kind, static_cast<int64_t>(random() % 12), 300, random);
      made.take = true;
      check_everywhere(made);
      make_finite(made);
      check_everywhere(made);
    }
  }
  for (const int64_t longest : {9000, 280000}) {
    Call made = bucket(Kind::kTies, 6, longest, random);
    made.take = true;
    make_finite(made);
    check_everywhere(made);
  }
}

// One entry that is not finite, at any place of any segment; alone, and with others behind it.
TEST(a_gradient_that_is_not_finite_stays_out) {
  Random random(14);
  for (const int64_t longest : {40, 300, 300, 3000, 280000}) {
    for (int round = 0; round < (longest > 3000 ? 2 : 12); ++round) {
      Call made = bucket(kKinds[random() % 3], longest > 3000 ? 4 : 150, longest, random);
      made.take = true;
      make_finite(made);
      for (int64_t wanted = 1 + static_cast<int64_t>(random() % 3); wanted > 0; --wanted) {
        const Segment& segment = made.segments[random() % made.segments.size()];
        if (segment.numel == 0) continue;
        const int64_t size = size_of(made.grad_dtype);
        const auto at = static_cast<int64_t>(segment.start + random() % segment.numel);
        made.grad[at * size + size - 1] = random() & 1 ? 0x7f : 0xff;
        made.grad[at * size + size - 2] = 0xff;
      }
      check_everywhere(made);
    }
  }
}

// What a large segment, divided among the threads, had given is put back when a later one is not finite.
TEST(a_large_segment_gives_nothing_when_a_later_one_is_bad) {
  Random random(15);
  for (const int64_t numel : {100, 270000}) {
    for (int round = 0; round < 3; ++round) {
      Call made = bucket(Kind::kNormal, 0, 0, random);
      made.take = true;
      made.segments = {{0, 10, 3}, {11, 270000, 300}, {270020, numel, numel / 10}};
      made.grad = tensor(Kind::kNormal, made.grad_dtype, 270020 + numel, random);
      made.v = tensor(Kind::kNormal, made.state_dtype, 270010 + numel, random);
      if (made.update != Update::kAccumulate) made.u = tensor(Kind::kNormal, made.state_dtype, 270010 + numel, random);
      make_finite(made);
      check_everywhere(made);
      made.grad[(270020 + numel / 2) * size_of(made.grad_dtype) + size_of(made.grad_dtype) - 1] = 0x7f;
      made.grad[(270020 + numel / 2) * size_of(made.grad_dtype) + size_of(made.grad_dtype) - 2] = 0xff;
      check_everywhere(made);
    }
  }
}

TEST(tables_that_lead_outside_are_refused) {
  constexpr int64_t kHuge = std::numeric_limits<int64_t>::max(), kLeast = std::numeric_limits<int64_t>::min();
  const auto refused = [](std::vector<Segment> rows, int64_t row, int64_t states = 8, int64_t count = 2) {
    const Problem problem = check(rows.data(), static_cast<int64_t>(rows.size()), 10, states, count);
    CHECK(problem.rule != nullptr && problem.row == row, problem.rule ? problem.rule : "accepted");
  };
  CHECK(check(nullptr, 0, 10, 0, 0).rule == nullptr, "an empty table");
  const Segment good[] = {{1, 5, 1}, {6, 0, 0}, {7, 3, 1}};
  CHECK(check(good, 3, 10, 8, 2).rule == nullptr, "a good table");
  refused({{3, 8, 2}}, 0);
  refused({{-1, 8, 2}}, 0);
  refused({{0, -1, 0}, {0, 8, 2}}, 0);
  refused({{0, 5, 1}, {4, 3, 1}}, 1);
  refused({{5, 5, 1}, {0, 3, 1}}, 1);
  for (const int64_t wrong : {kHuge, kHuge - 7, kLeast, int64_t{-1}}) {
    refused({{wrong, 8, 2}}, 0);
    refused({{1, wrong, 2}}, 0);
    refused({{1, 8, wrong}}, 0);
  }
  refused({{0, 8, 9}}, 0, 8, 9);
  refused({{0, 7, 2}}, -1);
  refused({{0, 8, 2}}, -1, 8, 3);
}

}  // namespace distopt::cpu::test
