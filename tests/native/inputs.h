// Inputs that make selection hard, from a seed.
#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "reference.h"

namespace distopt::cpu::test {

using Random = std::mt19937_64;

enum class Kind { kNormal, kTies, kEqual, kZeros, kBits, kAscending, kDescending, kSpikes, kWide };
inline constexpr Kind kKinds[] = {Kind::kNormal, Kind::kTies,      Kind::kEqual,      Kind::kZeros, Kind::kBits,
                                  Kind::kWide,   Kind::kAscending, Kind::kDescending, Kind::kSpikes};

inline float draw(Kind kind, int64_t i, int64_t n, Random& random) {
  std::normal_distribution<float> normal;
  switch (kind) {
    case Kind::kNormal:
      return normal(random);
    case Kind::kTies:
      return static_cast<float>(static_cast<int>(random() % 7) - 3);
    case Kind::kEqual:
      return -2.5f;
    case Kind::kZeros:
      return random() & 1 ? 0.0f : -0.0f;
    case Kind::kBits: {  // NaN of all payloads, infinities and denormals among them
      const auto bits = static_cast<uint32_t>(random());
      float x;
      std::memcpy(&x, &bits, 4);
      return x;
    }
    case Kind::kAscending:
      return static_cast<float>(i + 1);
    case Kind::kDescending:
      return -static_cast<float>(n - i);
    case Kind::kSpikes:
      return random() % 100 ? 1.0f : 1e6f * normal(random);
    case Kind::kWide:
      return normal(random) * std::ldexp(1.0f, static_cast<int>(random() % 200) - 100);
  }
  return 0;
}

inline std::vector<uint8_t> tensor(Kind kind, DType dtype, int64_t n, Random& random) {
  std::vector<uint8_t> bytes(n * size_of(dtype));
  for (int64_t i = 0; i < n; ++i) {
    const float x = draw(kind, i, n, random);
    if (dtype == DType::kFloat32) {
      std::memcpy(&bytes[4 * i], &x, 4);
      continue;
    }
    // The upper half of a float is a bfloat16, and some float16: enough of both.
    uint16_t halves[2];
    std::memcpy(halves, &x, 4);
    std::memcpy(&bytes[2 * i], &halves[1], 2);
  }
  return bytes;
}

// One segment of n, filled with the kind, and types and update by chance.
inline Call call(Kind kind, int64_t n, int64_t k, Random& random) {
  static constexpr DType kGrads[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  static constexpr Update kUpdates[] = {Update::kNone, Update::kAccumulate, Update::kHeavyBall, Update::kNesterov};
  Call made;
  made.update = kUpdates[random() % 4];
  made.grad_dtype = kGrads[random() % 3];
  made.state_dtype = kGrads[random() % (made.update == Update::kNone ? 3 : 2)];
  made.momentum = random() % 3 ? 0.9f : 0.0f;
  made.masking = random() & 1;
  made.v = tensor(kind, made.state_dtype, n, random);
  if (made.update != Update::kNone) made.grad = tensor(kind, made.grad_dtype, n, random);
  if (made.update == Update::kHeavyBall || made.update == Update::kNesterov) {
    made.u = tensor(Kind::kNormal, made.state_dtype, n, random);
  }
  made.segments = {{0, n, k}};
  return made;
}

}  // namespace distopt::cpu::test
