// What one pass does to a flat tensor, with the types erased: the common language of the kernels and their callers.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace distopt::cpu {

// How the selected-from tensor v gets its new value from the gradient g (Lin et al., Deep Gradient Compression, section
// 3).
enum class Update {
  kNone,        // v stays: plain top-k
  kAccumulate,  // v += g: error feedback
  kHeavyBall,   // u = m u + g; v += u
  kNesterov,    // u = m (u + g); v += u + g
};

struct Job {
  Update update;
  DType grad_dtype;
  DType state_dtype;  // of u and v; float16 only with kNone
  void* grad;         // nullptr with kNone; only read, but for `take`
  void* u;            // nullptr unless kHeavyBall or kNesterov
  void* v;            // never written with kNone
  float momentum;
  // Leaves zeros where grad was read, in the same pass, and stops before a block whose gradient is not finite, so that
  // none gets into u and v.
  bool take = false;
};

}  // namespace distopt::cpu
