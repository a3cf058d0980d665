// The element types that the kernels read and write, as plain bits, and their conversions to and from float.
//
// Arithmetic is always float. bfloat16 rounds to nearest even on store, as torch does; conversions to float are exact,
// denormals included.
#pragma once

#include <cstdint>
#include <cstring>

namespace distopt::cpu {

enum class DType { kFloat32, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// |x| as an integer that orders like |x|. All NaN share one key above infinity, whatever their payload.
inline constexpr int32_t kAbsMask = 0x7fffffff;
inline constexpr int32_t kNanKey = 0x7f800001;
inline constexpr int32_t kLargestFiniteKey = 0x7f7fffff;

namespace {  // one copy per translation unit: each is compiled for another instruction set

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float load(const float* p) { return *p; }

inline float load(const BFloat16* p) { return from_bits(static_cast<uint32_t>(p->bits) << 16); }

inline float load(const Float16* p) {
  const uint32_t sign = static_cast<uint32_t>(p->bits & 0x8000) << 16;
  const uint32_t rest = p->bits & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // inf, NaN
  if (rest >= 0x0400) return from_bits(sign | ((rest << 13) + (112u << 23)));      // rebias the exponent
  const float magnitude =
      static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f;  // denormal in half, normal in float
  return sign ? -magnitude : magnitude;
}

// Stores and returns what the memory now holds: selection ranks the rounded value.
inline float store(float* p, float x) { return *p = x; }

inline float store(BFloat16* p, float x) {
  const uint32_t bits = to_bits(x);
  const bool nan = (bits & kAbsMask) > 0x7f800000;
  p->bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  return load(p);
}

inline int32_t key_of(float x) {
  const auto bits = static_cast<int32_t>(to_bits(x) & kAbsMask);
  return bits < kNanKey ? bits : kNanKey;
}

}  // namespace
}  // namespace distopt::cpu
