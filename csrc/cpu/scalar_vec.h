// Vec (see pass.h) of one lane in portable C++: the tail of every path.
#pragma once

#include "dtypes.h"

namespace distopt::cpu {
namespace {

struct ScalarVec {
  static constexpr int kWidth = 1;
  using F = float;
  using I = int32_t;

  template <class T>
  static F load(const T* p) {
    return cpu::load(p);
  }
  template <class T>
  static F store(T* p, F x) {
    return cpu::store(p, x);
  }
  template <class T>
  static void zero(T* p) {
    *p = T{};
  }
  static F set1(float x) { return x; }
  static F add(F a, F b) { return a + b; }
  static F mul(F a, F b) { return a * b; }
  static I key(F x) { return key_of(x); }
  static I max(I a, I b) { return a > b ? a : b; }
  static int32_t largest(I key) { return key; }
  static bool any_above(I key, int32_t bound) { return key > bound; }
  static int count_above(I key, int32_t bound) { return key > bound; }
  static int append(I key, int32_t bound, int32_t ceiling, int32_t first, int32_t* index, int32_t* keys) {
    *index = first;
    *keys = key;
    return key > bound && key <= ceiling;
  }
};

}  // namespace
}  // namespace distopt::cpu
