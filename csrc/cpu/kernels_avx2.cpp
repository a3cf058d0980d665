// The AVX2 path (x86-64): eight lanes. Needs AVX2 and F16C, chosen at run time.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

// Only what follows is compiled for AVX2: inline functions of the standard library above stay runnable everywhere.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c")
#endif

#include "dense_pass.h"
#include "pass.h"

namespace distopt::cpu {
namespace {

struct Avx2Vec {
  static constexpr int kWidth = 8;
  using F = __m256;
  using I = __m256i;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const BFloat16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F store(float* p, F x) {
    _mm256_storeu_ps(p, x);
    return x;
  }
  static F store(BFloat16* p, F x) {
    // Round to nearest even by hand: the bfloat16 instructions of newer processors flush denormals.
    const I bits = _mm256_castps_si256(x);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const I rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const I nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const I words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
    return widen(packed);
  }
  static void zero(float* p) { _mm256_storeu_si256(reinterpret_cast<I*>(p), _mm256_setzero_si256()); }
  template <class Half>
  static void zero(Half* p) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_setzero_si128());
  }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static I key(F x) {
    const I bits = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(kAbsMask));
    return _mm256_min_epi32(bits, _mm256_set1_epi32(kNanKey));
  }
  static I max(I a, I b) { return _mm256_max_epi32(a, b); }
  static int32_t largest(I key) {
    __m128i most = _mm_max_epi32(_mm256_castsi256_si128(key), _mm256_extracti128_si256(key, 1));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1)));
  }
  static bool any_above(I key, int32_t bound) { return above(key, bound) != 0; }
  static int count_above(I key, int32_t bound) { return __builtin_popcount(above(key, bound)); }
  static int append(I key, int32_t bound, int32_t ceiling, int32_t first, int32_t* index, int32_t* keys) {
    alignas(32) int32_t lane[kWidth];
    _mm256_store_si256(reinterpret_cast<I*>(lane), key);
    int n = 0;
    for (unsigned left = above(key, bound) & ~above(key, ceiling); left; left &= left - 1, ++n) {
      const int j = __builtin_ctz(left);
      index[n] = first + j;
      keys[n] = lane[j];
    }
    return n;
  }

 private:
  static F widen(__m128i words) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16)); }
  static unsigned above(I key, int32_t bound) {
    const I mask = _mm256_cmpgt_epi32(key, _mm256_set1_epi32(bound));
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(mask)));
  }
};

}  // namespace

const Kernels kAvx2Kernels = {pass_any<Avx2Vec>,
                              maxima_any<Avx2Vec>,
                              collect_any<Avx2Vec>,
                              count_above_any,
                              finite16,
                              finite32,
                              finite64,
                              scale_any<Avx2Vec>,
                              momentum_any<Avx2Vec>,
                              decay_any<Avx2Vec>,
                              weighted_sum_any<Avx2Vec>};

}  // namespace distopt::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
