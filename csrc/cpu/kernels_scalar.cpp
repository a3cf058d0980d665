// The portable path: four lanes of the compiler's own vectors (SSE2 on x86-64, NEON on aarch64, plain code elsewhere).
#include "dense_pass.h"
#include "kernels.h"
#include "pass.h"

namespace distopt::cpu {
namespace {

struct PortableVec {
  static constexpr int kWidth = 4;
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));

  static F load(const float* p) {
    F x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
  template <class T>
  static F load(const T* p) {
    return F{cpu::load(p), cpu::load(p + 1), cpu::load(p + 2), cpu::load(p + 3)};
  }
  static F store(float* p, F x) {
    __builtin_memcpy(p, &x, sizeof x);
    return x;
  }
  static F store(BFloat16* p, F x) {
    return F{cpu::store(p, x[0]), cpu::store(p + 1, x[1]), cpu::store(p + 2, x[2]), cpu::store(p + 3, x[3])};
  }
  template <class T>
  static void zero(T* p) {
    __builtin_memset(p, 0, kWidth * sizeof(T));
  }
  static F set1(float x) { return F{x, x, x, x}; }
  static F add(F a, F b) { return a + b; }
  static F mul(F a, F b) { return a * b; }
  static I set1(int32_t x) { return I{x, x, x, x}; }
  static I max(I a, I b) { return blend(a > b, a, b); }
  static I key(F x) {
    I bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    bits &= set1(kAbsMask);
    return blend(bits > set1(kNanKey), set1(kNanKey), bits);
  }
  static int32_t largest(I key) {
    const int32_t a = key[0] > key[1] ? key[0] : key[1], b = key[2] > key[3] ? key[2] : key[3];
    return a > b ? a : b;
  }
  static bool any_above(I key, int32_t bound) {
    const I above = key > set1(bound);
    uint64_t halves[2];
    __builtin_memcpy(halves, &above, sizeof halves);
    return (halves[0] | halves[1]) != 0;
  }
  static int count_above(I key, int32_t bound) {
    const I above = key > set1(bound);
    return -(above[0] + above[1] + above[2] + above[3]);
  }
  static int append(I key, int32_t bound, int32_t ceiling, int32_t first, int32_t* index, int32_t* keys) {
    int n = 0;
    for (int j = 0; j < kWidth; ++j) n += ScalarVec::append(key[j], bound, ceiling, first + j, index + n, keys + n);
    return n;
  }

 private:
  static I blend(I mask, I yes, I no) { return (mask & yes) | (~mask & no); }
};

}  // namespace

const Kernels kScalarKernels = {pass_any<PortableVec>,
                                maxima_any<PortableVec>,
                                collect_any<PortableVec>,
                                count_above_any,
                                finite16,
                                finite32,
                                finite64,
                                scale_any<PortableVec>,
                                momentum_any<PortableVec>,
                                decay_any<PortableVec>,
                                weighted_sum_any<PortableVec>};

}  // namespace distopt::cpu
