// The element types that the kernels read and write, their conversions, the key that orders them, and the update.
//
// Arithmetic is float, each product and sum rounded on its own: results equal the reference bit for bit. bfloat16
// rounds to nearest even on store, as torch does; conversions to float are exact, denormals included.
#pragma once

#include "kernels.h"
#include "portable.cuh"

namespace distopt::cuda {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// |x| as an integer that orders like |x|. All NaN share one key above infinity, whatever their payload.
inline constexpr int32_t kAbsMask = 0x7fffffff;
inline constexpr int32_t kNanKey = 0x7f800001;

// A key is wanted if it is above a bound; these two are above, or not above, which every key is.
inline constexpr int32_t kAcceptAll = -1;
inline constexpr int32_t kAcceptNone = 0x7fffffff;
inline constexpr int32_t kNoKey = -1;  // of a place without an element: above no bound

DISTOPT_HD inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

DISTOPT_HD inline uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

DISTOPT_HD inline float widen(float x) { return x; }

DISTOPT_HD inline float widen(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

DISTOPT_HD inline float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // inf, NaN
  if (rest >= 0x0400) return from_bits(sign | ((rest << 13) + (112u << 23)));      // rebias the exponent
  const float magnitude = static_cast<float>(rest) * 0x1p-24f;                     // denormal there, normal here
  return from_bits(sign | to_bits(magnitude));
}

template <class S>
DISTOPT_HD S narrow(float x);

template <>
DISTOPT_HD inline float narrow<float>(float x) {
  return x;
}

template <>
DISTOPT_HD inline BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = to_bits(x);
  const bool nan = (bits & kAbsMask) > 0x7f800000;
  return {nan ? static_cast<uint16_t>(0x7fc0) : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

DISTOPT_HD inline int32_t key_of(float x) {
  const auto bits = static_cast<int32_t>(to_bits(x) & kAbsMask);
  return bits < kNanKey ? bits : kNanKey;
}

// Never contracted to a fused multiply-add, whatever the flags.
DISTOPT_HD inline float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

DISTOPT_HD inline float sum(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// Lin et al., Deep Gradient Compression, section 3.
template <Update kUpdate>
DISTOPT_HD inline void update([[maybe_unused]] float g, [[maybe_unused]] float& u, [[maybe_unused]] float& v,
                              [[maybe_unused]] float momentum) {
  if constexpr (kUpdate == Update::kAccumulate) {
    v = sum(v, g);
  } else if constexpr (kUpdate == Update::kHeavyBall) {
    u = sum(product(u, momentum), g);
    v = sum(v, u);
  } else if constexpr (kUpdate == Update::kNesterov) {
    u = product(sum(u, g), momentum);
    v = sum(v, sum(u, g));
  }
}

DISTOPT_HD constexpr bool has_velocity(Update update) {
  return update == Update::kHeavyBall || update == Update::kNesterov;
}

}  // namespace distopt::cuda
