#include "select.h"

#include "radix.h"

namespace distopt::cpu {

Threshold threshold(const int32_t* keys, int64_t n, int64_t k) {
  return radix_threshold([keys](int64_t i) { return keys[i]; }, n, k);
}

void cut(Candidates& c) {
  const Threshold least = threshold(c.key, c.count, c.k);
  int64_t kept = 0;
  for (int64_t i = 0; i < c.count; ++i) {
    const int32_t key = c.key[i];
    c.index[kept] = c.index[i];
    c.key[kept] = key;
    kept += key > least.key || (key == least.key && i <= least.last_tie);
  }
  c.count = kept;
  c.bound = least.key;
}

void make_room(Candidates& c) {
  if (c.ceiling == kNoCeiling) return cut(c);
  c.count = 0;
  c.bound = kAcceptNone;
}

}  // namespace distopt::cpu
