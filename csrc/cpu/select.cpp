#include "select.h"

#include "radix.h"

namespace distopt::cpu {

int32_t kth_largest(const int32_t* keys, int64_t n, int64_t k, int64_t* num_above) {
  return radix_kth_largest([keys](int64_t i) { return keys[i]; }, n, k, num_above);
}

void cut(Candidates& c) {
  int64_t num_above = 0;
  const int32_t kth = kth_largest(c.key, c.count, c.k, &num_above);
  int64_t ties_left = c.k - num_above;
  int64_t kept = 0;
  for (int64_t i = 0; i < c.count; ++i) {
    const int32_t key = c.key[i];
    const bool tie = key == kth && ties_left > 0;
    ties_left -= tie;
    c.index[kept] = c.index[i];
    c.key[kept] = key;
    kept += key > kth || tie;
  }
  c.count = kept;
  c.bound = kth;
}

}  // namespace distopt::cpu
