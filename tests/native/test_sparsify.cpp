// One tensor: every kind of input, at sizes around the widths of vectors, blocks, parts, and the limits between the
// ways to select.
#include <cmath>
#include <utility>

#include "cpu/counters.h"
#include "cpu/kernels.h"
#include "cpu/selection.h"
#include "inputs.h"
#include "native_test.h"
#include "reference.h"

namespace distopt::cpu::test {
namespace {

int64_t some_k(int64_t n, Random& random) {
  switch (random() % 6) {
    case 0:
      return n > 0;
    case 1:
      return (n + 999) / 1000;
    case 2:
      return (n + 99) / 100;
    case 3:
      return n / 4;
    case 4:
      return n;
    default:
      return static_cast<int64_t>(random() % (n + 1));
  }
}

}  // namespace

TEST(small_tensors) {
  Random random(1);
  for (int round = 0; round < 40; ++round) {
    for (const Kind kind : kKinds) {
      const int64_t n = round < 20 ? round : static_cast<int64_t>(random() % 400);
      check_everywhere(call(kind, n, some_k(n, random), random));
    }
  }
}

TEST(each_way_at_its_limits) {
  Random random(2);
  for (const int64_t n : {1000, 4096, 16384, 16385, 70001}) {
    for (const Kind kind : kKinds) {
      for (int round = 0; round < 3; ++round) check_everywhere(call(kind, n, some_k(n, random), random));
    }
  }
}

TEST(long_enough_for_three_threads) {
  Random random(3);
  for (const Kind kind : kKinds) check_everywhere(call(kind, 270001, some_k(270001, random), random));
}

// The ways agree where the sizes would not have chosen them.
TEST(each_way_for_any_size) {
  Random random(4);
  using Way = bool (*)(const Job&, int64_t, int64_t, const Threads&, int32_t*);
  for (const Kind kind : kKinds) {
    for (const int64_t n : {1, 64, 1000, 20000, 140000}) {
      const int64_t blocks = (n + kBlock - 1) / kBlock;
      const int64_t k = 1 + static_cast<int64_t>(random() % blocks);
      Call made = call(kind, n, k, random);
      const Result expected = reference(made);
      for (const Way way : {select_by_maxima, select_by_candidates, select_by_threshold}) {
        for (const int64_t num_threads : {1, 2}) {
          Call copy = made;
          std::vector<int32_t> found(k);
          CHECK(way(copy.job(), n, k, some_threads(num_threads), found.data()), "nothing is taken");
          CHECK(found == expected.indices, "n " + std::to_string(n) + ", k " + std::to_string(k));
        }
      }
    }
  }
}

// Other values exactly where sample.cpp looks: the k-th key is not where the sample says, and another reading finds it.
TEST(a_sample_that_misleads) {
  Random random(12);
  const int64_t n = 140000;
  for (const auto& [samples, k] : {std::pair<int64_t, int64_t>{1093, 2500}, {4096, 20000}}) {
    for (const float factor : {1e3f, 1e-3f}) {
      Call made = call(Kind::kNormal, n, k, random);
      made.update = Update::kNone;
      made.state_dtype = DType::kFloat32;
      made.v = tensor(Kind::kNormal, DType::kFloat32, n, random);
      const int64_t stretch = n / samples;
      for (int64_t i = 0; i < samples; ++i) {
        const uint64_t hash = static_cast<uint32_t>(i) * 2654435761u;
        const int64_t at = i * stretch + static_cast<int64_t>((hash * static_cast<uint64_t>(stretch)) >> 32);
        float x;
        std::memcpy(&x, &made.v[4 * at], 4);
        x *= factor;
        std::memcpy(&made.v[4 * at], &x, 4);
      }
      const int64_t before = total(Counter::kSecondCollections);
      check_everywhere(made);
      const bool again = total(Counter::kSecondCollections) > before;
      CHECK(again == (factor > 1 || k == 20000), std::to_string(k));
    }
  }
}

// Every float16, and bfloat16 on the way to and fro, against arithmetic.
TEST(sixteen_bits) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const Float16 half{static_cast<uint16_t>(bits)};
    const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
    const double sign = bits >> 15 ? -1 : 1;
    const float x = load(&half);
    if (exponent == 31) {
      CHECK(fraction ? std::isnan(x) : x == sign * INFINITY, std::to_string(bits));
    } else {
      const double expected =
          sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
      CHECK(x == expected && std::signbit(x) == (sign < 0), std::to_string(bits));
    }
    BFloat16 brain{static_cast<uint16_t>(bits)}, back;
    const float y = load(&brain);
    CHECK(std::isnan(y) ? std::isnan(store(&back, y)) : store(&back, y) == y && back.bits == bits,
          std::to_string(bits));
  }
  Random random(5);
  for (int i = 0; i < 100000; ++i) {
    const float x = draw(Kind::kBits, 0, 0, random);
    BFloat16 rounded;
    const float y = store(&rounded, x);
    if (std::isnan(x) || std::isinf(y)) continue;
    // Nearest: neither neighbour is closer; even: a tie has a zero in the last place.
    const BFloat16 down{static_cast<uint16_t>(rounded.bits - 1)}, up{static_cast<uint16_t>(rounded.bits + 1)};
    const double error = std::fabs(static_cast<double>(x) - y);
    for (const BFloat16& other : {down, up}) {
      if ((rounded.bits & 0x7fff) == 0 && &other == &down) continue;
      const double theirs = std::fabs(static_cast<double>(x) - load(&other));
      if (std::isnan(theirs)) continue;
      CHECK(error < theirs || (error == theirs && rounded.bits % 2 == 0), std::to_string(x));
    }
  }
}

TEST(finite) {
  Random random(6);
  for (int candidate = 0; candidate < kNumPaths; ++candidate) {
    if (!has_path(candidate)) continue;
    const int before = path();
    set_path(candidate);
    for (const int64_t n : {0, 1, 63, 64, 65, 5000}) {
      std::vector<float> x(n, 3e38f);
      const auto* words = reinterpret_cast<const uint32_t*>(x.data());
      CHECK(kernels().finite32(words, n), std::to_string(n));
      if (n == 0) continue;
      x[random() % n] = random() & 1 ? INFINITY : NAN;
      CHECK(!kernels().finite32(words, n), std::to_string(n));
    }
    set_path(before);
  }
}

}  // namespace distopt::cpu::test
