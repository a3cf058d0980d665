// Each owner's k largest, as if its residue class were a tensor of its own.
#include <memory>

#include "cpu/interleaved.h"
#include "cpu/kernels.h"
#include "inputs.h"
#include "native_test.h"
#include "reference.h"

namespace distopt::cpu::test {
namespace {

void check_owners(const std::vector<uint8_t>& x, DType dtype, int64_t k, int64_t num_owners) {
  const int64_t n = static_cast<int64_t>(x.size()) / size_of(dtype), size = size_of(dtype);
  const int before = path();
  for (int candidate = 0; candidate < kNumPaths; ++candidate) {
    if (!set_path(candidate)) continue;
    const std::unique_ptr<int32_t[]> indices(new int32_t[num_owners * k]);
    const std::unique_ptr<uint8_t[]> values(new uint8_t[num_owners * k * size]);
    topk_interleaved(x.data(), dtype, n, k, num_owners, values.get(), indices.get());
    for (int64_t owner = 0; owner < num_owners; ++owner) {
      const std::vector<int32_t> expected = largest(x, dtype, owner, num_owners, n, k);
      const int32_t* row = indices.get() + owner * k;
      const std::string what = "owner " + std::to_string(owner) + " of " + std::to_string(num_owners) + ", k " +
                               std::to_string(k) + ", n " + std::to_string(n);
      CHECK(std::equal(expected.begin(), expected.end(), row), what);
      for (int64_t i = 0; i < k; ++i) {
        const int64_t position = row[i] * num_owners + owner;
        CHECK(std::memcmp(&values[(owner * k + i) * size], &x[position * size], size) == 0, what);
      }
    }
  }
  set_path(before);
}

}  // namespace

TEST(owners_as_alone) {
  Random random(9);
  for (const Kind kind : kKinds) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (const int64_t n : {1, 100, 5000, 30011}) {
        const int64_t num_owners = 1 + static_cast<int64_t>(random() % std::min<int64_t>(n, 40));
        const auto x = tensor(kind, dtype, n, random);
        check_owners(x, dtype, static_cast<int64_t>(random() % (n / num_owners + 1)), num_owners);
        check_owners(x, dtype, (n / num_owners + 99) / 100, num_owners);
      }
    }
  }
}

TEST(one_owner_has_next_to_nothing) {
  // The sample's bound leaves this owner with too few: a second collection has to find them.
  Random random(10);
  auto x = tensor(Kind::kNormal, DType::kFloat32, 40000, random);
  for (int64_t i = 3; i < 40000; i += 8) {
    float small;
    std::memcpy(&small, &x[4 * i], 4);
    small *= 1e-6f;
    std::memcpy(&x[4 * i], &small, 4);
  }
  check_owners(x, DType::kFloat32, 50, 8);
}

TEST(more_owners_than_entries) {
  check_owners(std::vector<uint8_t>(12), DType::kFloat32, 0, 1000);
  check_owners(std::vector<uint8_t>(4000), DType::kFloat32, 1, 1000);
}

}  // namespace distopt::cpu::test
