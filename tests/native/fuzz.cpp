// A libFuzzer target: bytes become a call (types, sizes, table, tensors of any bits) and a path.
//
// A table that `check` refuses must not be used; whatever else it says, the kernels must give what the reference gives
// and stay inside their buffers (AddressSanitizer watches).
#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/interleaved.h"
#include "cpu/kernels.h"
#include "cpu/scatter.h"
#include "cpu/segments.h"
#include "native_test.h"
#include "reference.h"

namespace {

using namespace distopt::cpu;
using namespace distopt::cpu::test;

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  uint64_t number(size_t bytes) {
    uint64_t x = 0;
    const size_t taken = std::min(bytes, size_);
    std::memcpy(&x, data_, taken);
    data_ += taken;
    size_ -= taken;
    return x;
  }

  // `count` bytes that repeat the next few: long tensors from short inputs.
  std::vector<uint8_t> tensor(size_t count) {
    std::vector<uint8_t> bytes(count);
    const size_t period = std::min<size_t>(size_, number(1));
    for (size_t i = 0; i < count && period; ++i) bytes[i] = data_[i % period] ^ static_cast<uint8_t>(i / period / 64);
    data_ += period;
    size_ -= period;
    return bytes;
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

void fuzz_interleaved(const Call& call, Bytes& bytes) {
  const int64_t n = call.numel_of_state(), num_owners = 1 + static_cast<int64_t>(bytes.number(1) % 16);
  const int64_t k = static_cast<int64_t>(bytes.number(2)) % (n / num_owners + 1);
  std::unique_ptr<int32_t[]> indices(new int32_t[num_owners * k]);
  std::unique_ptr<uint8_t[]> values(new uint8_t[num_owners * k * size_of(call.state_dtype)]);
  topk_interleaved(call.v.data(), call.state_dtype, n, k, num_owners, values.get(), indices.get());
  for (int64_t owner = 0; owner < num_owners; ++owner) {
    const auto expected = largest(call.v, call.state_dtype, owner, num_owners, n, k);
    CHECK(std::equal(expected.begin(), expected.end(), indices.get() + owner * k), "owners");
  }
}

// As above, and the gradient is left zero, or refused. Most bytes are finite, so what is not is also tried without.
void fuzz_take(Call call, bool also_finite) {
  call.take = true;
  if (first_bad(call) >= 0) {
    const std::string flaw = flaw_of_refusal(with_kernels(call, Threads(), true), call);
    CHECK(flaw.empty(), flaw);
    if (!also_finite) return;
    make_finite(call);
  }
  const std::string what = difference(with_kernels(call, Threads(), true), reference(call), call);
  CHECK(what.empty(), what);
}

void fuzz_scatter(const Call& call, Bytes& bytes) {
  const int64_t n = static_cast<int64_t>(bytes.number(1)), count = static_cast<int64_t>(call.v.size() / 4);
  const std::vector<int32_t> indices(reinterpret_cast<const int32_t*>(call.v.data()),
                                     reinterpret_cast<const int32_t*>(call.v.data()) + count);
  std::vector<float> out(n), values(count, 1.0f);
  const bool inside = std::all_of(indices.begin(), indices.end(), [n](int32_t i) { return i >= 0 && i < n; });
  CHECK((first_out_of_range(indices.data(), count, n) < 0) == inside, "range");
  if (inside) scatter_add(out.data(), indices.data(), values.data(), count);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  static constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  Call call;
  call.update = static_cast<Update>(bytes.number(1) % 4);
  call.grad_dtype = kDTypes[bytes.number(1) % 3];
  call.state_dtype = kDTypes[bytes.number(1) % (call.update == Update::kNone ? 3 : 2)];
  call.momentum = static_cast<float>(bytes.number(1) % 5) / 4;
  const uint64_t options = bytes.number(1);
  call.masking = options & 1;
  set_path(static_cast<int>((options >> 3) % kNumPaths));  // the machine may lack it: then the one before
  // 1. A table: usually one that fits, with numbers of any size now and then.
  const auto num_segments = static_cast<int64_t>(1 + bytes.number(1) % 4);
  int64_t end = 0, covered = 0;
  for (int64_t i = 0; i < num_segments; ++i) {
    const uint64_t shape = bytes.number(1), longest = i ? 1000 : 17000;  // the first can take every way to select
    auto numel = static_cast<int64_t>(bytes.number(2) % (shape & 1 ? longest : 300));
    int64_t k = static_cast<int64_t>(bytes.number(2)) % (numel + 1);
    if (shape & 2) k = std::min<int64_t>(numel, 1 + k / 256);
    int64_t start = end + static_cast<int64_t>(shape >> 6);
    if (call.update == Update::kNone) start = 0;
    end = start + numel;
    covered += numel;
    if ((shape & 0x3c) == 0x3c) start = static_cast<int64_t>(bytes.number(8));
    if ((shape & 0x3c) == 0x38) numel = static_cast<int64_t>(bytes.number(8));
    if ((shape & 0x3c) == 0x34) k = static_cast<int64_t>(bytes.number(8));
    call.segments.push_back({start, numel, k});
    if (call.update == Update::kNone) break;
  }
  call.v = bytes.tensor(covered * size_of(call.state_dtype));
  if (call.update != Update::kNone) call.grad = bytes.tensor(end * size_of(call.grad_dtype));
  if (call.update > Update::kAccumulate) call.u = bytes.tensor(covered * size_of(call.state_dtype));
  // 2. Refused, or the same as the reference.
  uint64_t count = 0;
  for (const Segment& segment : call.segments) count += static_cast<uint64_t>(segment.k);
  const auto grad_numel = call.update == Update::kNone ? covered : end;
  const Problem problem = check(call.segments.data(), static_cast<int64_t>(call.segments.size()), grad_numel, covered,
                                static_cast<int64_t>(count));
  if (problem.rule == nullptr) {
    const bool single = call.segments.size() == 1 && call.segments[0].start == 0;
    const bool as_segments = call.update != Update::kNone && (!single || options & 64);
    const std::string what = difference(with_kernels(call, Threads(), as_segments), reference(call), call);
    CHECK(what.empty(), what);
    if (call.update != Update::kNone) fuzz_take(call, options & 2);
  }
  if (options & 128) fuzz_interleaved(call, bytes);
  fuzz_scatter(call, bytes);
  return 0;
}
