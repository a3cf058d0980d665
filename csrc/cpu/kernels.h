// The table of functions that exist once per instruction set, and the choice among them at run time.
//
// "scalar" is portable C++ and always there; "avx2" and "avx512" on x86-64 where the processor and the system have
// them; "neon" on aarch64.
#pragma once

#include <cstdint>

#include "dense.h"
#include "job.h"
#include "select.h"

namespace distopt::cpu {

struct Kernels {
  // Applies job.update to elements [begin, end) and appends those whose key is above c.bound and not above c.ceiling,
  // making room when c is full. c.capacity >= max(k, 1) + kBlock. False: it stopped, see Job::take.
  bool (*pass)(const Job& job, int64_t begin, int64_t end, Candidates& c);
  // Applies job.update to elements [begin, end) and writes the largest key of each kBlock of them, counted from begin;
  // the last block may be shorter. False as above.
  bool (*maxima)(const Job& job, int64_t begin, int64_t end, int32_t* largest);
  // Writes the positions in [begin, end) of v whose key is above the bound, ascending, at most `room`; their number.
  int64_t (*collect)(const Job& job, int64_t begin, int64_t end, int32_t bound, int32_t* indices, int64_t room);
  // How many of n keys are above the bound.
  int64_t (*count_above)(const int32_t* keys, int64_t n, int32_t bound);
  // Whether no element has all exponent bits set, for words of 16, 32 and 64 bits.
  bool (*finite16)(const uint16_t* words, int64_t n, uint16_t exponent);
  bool (*finite32)(const uint32_t* words, int64_t n);
  bool (*finite64)(const uint64_t* words, int64_t n);
  // Elements [begin, end) of what dense.h says.
  bool (*scale)(float* x, int64_t begin, int64_t end, float factor);
  void (*momentum)(float* g, float* u, int64_t begin, int64_t end, float m, bool nesterov);
  void (*decay)(const Decay& job, int64_t begin, int64_t end);
  void (*weighted_sum)(const WeightedSum& job, int64_t begin, int64_t end);
};

enum Path : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kNeon = 3 };
inline constexpr int kNumPaths = 4;

// The fastest path of this machine, and whether it has a given one.
int best_path();
bool has_path(int path);

// Makes later calls of kernels(), from any thread, use this path. False, and no change, if the machine lacks it.
bool set_path(int path);
int path();

const Kernels& kernels();

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

}  // namespace distopt::cpu
