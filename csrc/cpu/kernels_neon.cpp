// The NEON path (aarch64): four lanes. Part of every aarch64 processor.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "dense_pass.h"
#include "kernels.h"
#include "pass.h"

namespace distopt::cpu {
namespace {

struct NeonVec {
  static constexpr int kWidth = 4;
  using F = float32x4_t;
  using I = int32x4_t;

  static F load(const float* p) { return vld1q_f32(p); }
  static F load(const BFloat16* p) { return widen(vld1_u16(reinterpret_cast<const uint16_t*>(p))); }
  static F load(const Float16* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
  }
  static F store(float* p, F x) {
    vst1q_f32(p, x);
    return x;
  }
  static F store(BFloat16* p, F x) {
    // Round to nearest even by hand: not every processor has the bfloat16 instructions.
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
    const uint16x4_t words = vmovn_u32(vbslq_u32(vceqq_f32(x, x), rounded, vdupq_n_u32(0x7fc0)));
    vst1_u16(reinterpret_cast<uint16_t*>(p), words);
    return widen(words);
  }
  static void zero(float* p) { vst1q_f32(p, vdupq_n_f32(0)); }
  template <class Half>
  static void zero(Half* p) {
    vst1_u16(reinterpret_cast<uint16_t*>(p), vdup_n_u16(0));
  }
  static F set1(float x) { return vdupq_n_f32(x); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static I key(F x) {
    return vminq_s32(vandq_s32(vreinterpretq_s32_f32(x), vdupq_n_s32(kAbsMask)), vdupq_n_s32(kNanKey));
  }
  static I max(I a, I b) { return vmaxq_s32(a, b); }
  static int32_t largest(I key) { return vmaxvq_s32(key); }
  static bool any_above(I key, int32_t bound) { return vmaxvq_s32(key) > bound; }
  static int count_above(I key, int32_t bound) {
    return static_cast<int>(vaddvq_u32(vshrq_n_u32(vcgtq_s32(key, vdupq_n_s32(bound)), 31)));
  }
  static int append(I key, int32_t bound, int32_t ceiling, int32_t first, int32_t* index, int32_t* keys) {
    // All four are written; the next ones overwrite what does not count. Cheaper than four branches.
    const uint32x4_t over = vcgtq_s32(key, vdupq_n_s32(bound)), under = vcleq_s32(key, vdupq_n_s32(ceiling));
    uint32_t passes[kWidth];
    int32_t lane[kWidth];
    vst1q_u32(passes, vshrq_n_u32(vandq_u32(over, under), 31));
    vst1q_s32(lane, key);
    int n = 0;
    for (int j = 0; j < kWidth; ++j) {
      index[n] = first + j;
      keys[n] = lane[j];
      n += static_cast<int>(passes[j]);
    }
    return n;
  }

 private:
  static F widen(uint16x4_t words) { return vreinterpretq_f32_u32(vshll_n_u16(words, 16)); }
};

}  // namespace

const Kernels kNeonKernels = {pass_any<NeonVec>,
                              maxima_any<NeonVec>,
                              collect_any<NeonVec>,
                              count_above_any,
                              finite16,
                              finite32,
                              finite64,
                              scale_any<NeonVec>,
                              momentum_any<NeonVec>,
                              decay_any<NeonVec>,
                              weighted_sum_any<NeonVec>};

}  // namespace distopt::cpu
#endif  // __aarch64__
