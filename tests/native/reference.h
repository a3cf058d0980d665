// What the kernels must compute, in the obvious way: a loop for the update, an ordering of (magnitude, position) for
// the selection.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/job.h"
#include "cpu/segments.h"
#include "cpu/threads.h"

namespace distopt::cpu::test {

// A call of one of the operations, with all it reads. Tensors are bytes, so that any bits can be in them.
struct Call {
  Update update = Update::kNone;
  DType grad_dtype = DType::kFloat32;
  DType state_dtype = DType::kFloat32;
  float momentum = 0;
  bool masking = false;
  bool take = false;
  std::vector<uint8_t> grad, u, v;
  std::vector<Segment> segments;  // with kNone: one, all of v

  Job job();
  int64_t numel_of_state() const;
  int64_t count() const;
};

// What it leaves and returns.
struct Result {
  std::vector<uint8_t> grad, u, v;
  std::vector<uint8_t> values;
  std::vector<int32_t> indices;
  int64_t bad = -1;
};

int64_t size_of(DType dtype);

// The positions of the k largest |x| among x[first], x[first + step], ... below n, counted in steps, ascending.
std::vector<int32_t> largest(const std::vector<uint8_t>& x, DType dtype, int64_t first, int64_t step, int64_t n,
                             int64_t k);

Result reference(Call call);

// The first segment whose gradient is not finite; -1 if there is none.
int64_t first_bad(const Call& call);

// Replaces what is not finite in the gradient, inside the segments.
void make_finite(Call& call);

// By sparsify_segments, or, for a single segment that starts at 0, by sparsify. Buffers are exactly as long as they
// have to be, so that a sanitizer sees what lies outside.
Result with_kernels(Call call, const Threads& threads, bool as_segments);

// Empty if equal; NaN equals NaN.
std::string difference(const Result& a, const Result& b, const Call& call);

// What is wrong with the result of a call with `take` whose gradient has a first_bad; empty if nothing.
std::string flaw_of_refusal(const Result& found, const Call& call);

// Runs the call on every path of this machine, alone and with threads, and compares; aborts on a difference.
void check_everywhere(const Call& call);

// As many threads as tasks, new ones each time.
Threads some_threads(int64_t count);

}  // namespace distopt::cpu::test
