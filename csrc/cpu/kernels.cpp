#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>

namespace distopt::cpu {
namespace {

std::atomic<int> chosen{best_path()};

#if defined(__x86_64__)
// __builtin_cpu_supports("f16c") is unknown to clang 14.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

}  // namespace

int best_path() {
#if defined(__x86_64__)
  __builtin_cpu_init();  // asks the system too: the registers must be saved on a context switch
  const bool avx2 = __builtin_cpu_supports("avx2") && has_f16c();
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return kAvx512;
  }
  if (avx2) return kAvx2;
#elif defined(__aarch64__)
  return kNeon;
#endif
  return kScalar;
}

bool has_path(int path) {
  const int best = best_path();
  return path == kScalar || path == best || (path == kAvx2 && best == kAvx512);
}

bool set_path(int path) {
  if (!has_path(path)) return false;
  chosen.store(path, std::memory_order_relaxed);
  return true;
}

int path() { return chosen.load(std::memory_order_relaxed); }

const Kernels& kernels() {
#if defined(__x86_64__)
  if (path() == kAvx512) return kAvx512Kernels;
  if (path() == kAvx2) return kAvx2Kernels;
#elif defined(__aarch64__)
  if (path() == kNeon) return kNeonKernels;
#endif
  return kScalarKernels;
}

}  // namespace distopt::cpu
