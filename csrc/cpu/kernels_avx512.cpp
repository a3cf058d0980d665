// The AVX-512 path (x86-64): sixteen lanes. Needs AVX-512 F, BW, DQ and VL, chosen at run time.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

// Only what follows is compiled for AVX-512: inline functions of the standard library above stay runnable everywhere.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,f16c")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarm of GCC 12 inside its own intrinsics (bug 105593)
#endif

#include "dense_pass.h"
#include "pass.h"

namespace distopt::cpu {
namespace {

struct Avx512Vec {
  static constexpr int kWidth = 16;
  using F = __m512;
  using I = __m512i;

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const BFloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F load(const Float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F store(float* p, F x) {
    _mm512_storeu_ps(p, x);
    return x;
  }
  static F store(BFloat16* p, F x) {
    // Round to nearest even by hand: vcvtneps2bf16 flushes denormals.
    const I bits = _mm512_castps_si512(x);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m256i words = _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
    return widen(words);
  }
  static void zero(float* p) { _mm512_storeu_si512(p, _mm512_setzero_si512()); }
  template <class Half>
  static void zero(Half* p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_setzero_si256());
  }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static I key(F x) {
    const I bits = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(kAbsMask));
    return _mm512_min_epi32(bits, _mm512_set1_epi32(kNanKey));
  }
  static I max(I a, I b) { return _mm512_max_epi32(a, b); }
  static int32_t largest(I key) { return _mm512_reduce_max_epi32(key); }
  static bool any_above(I key, int32_t bound) { return above(key, bound) != 0; }
  static int count_above(I key, int32_t bound) { return __builtin_popcount(above(key, bound)); }
  static int append(I key, int32_t bound, int32_t ceiling, int32_t first, int32_t* index, int32_t* keys) {
    // Compress in a register, then store whole: a compressing store to memory takes hundreds of cycles on Zen 4.
    const __mmask16 mask = _kandn_mask16(above(key, ceiling), above(key, bound));
    const I lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const I indices = _mm512_add_epi32(lane, _mm512_set1_epi32(first));
    _mm512_storeu_si512(index, _mm512_maskz_compress_epi32(mask, indices));
    _mm512_storeu_si512(keys, _mm512_maskz_compress_epi32(mask, key));
    return __builtin_popcount(mask);
  }

 private:
  static F widen(__m256i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16)); }
  static __mmask16 above(I key, int32_t bound) { return _mm512_cmpgt_epi32_mask(key, _mm512_set1_epi32(bound)); }
};

}  // namespace

const Kernels kAvx512Kernels = {pass_any<Avx512Vec>,
                                maxima_any<Avx512Vec>,
                                collect_any<Avx512Vec>,
                                count_above_any,
                                finite16,
                                finite32,
                                finite64,
                                scale_any<Avx512Vec>,
                                momentum_any<Avx512Vec>,
                                decay_any<Avx512Vec>,
                                weighted_sum_any<Avx512Vec>};

}  // namespace distopt::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
