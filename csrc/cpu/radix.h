// The k-th largest of n keys in three passes over their 31 bits, whatever the keys are: no pivot, so no bad case.
#pragma once

#include <cstdint>

#include "select.h"

namespace distopt::cpu {
namespace {

// The digit of histogram[0..bins) that holds the rank-th largest entry; rank becomes the rank inside that digit.
inline int32_t find_digit(const int32_t* histogram, int bins, int64_t* rank) {
  int digit = bins - 1;
  while (*rank > histogram[digit]) *rank -= histogram[digit--];
  return digit;
}

// key_at(i) gives the key of entry i, in [0, 2^31).
template <class KeyAt>
Threshold radix_threshold(KeyAt key_at, int64_t n, int64_t k) {
  constexpr int kShift[] = {20, 10, 0};
  constexpr int kBits[] = {11, 10, 10};
  int64_t rank = k;
  int32_t prefix = 0;
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = kShift[pass], bits = kBits[pass], bins = 1 << bits;
    // 1. Count the next digit among the keys that share the digits found so far.
    int32_t histogram[1 << 11] = {};
    for (int64_t i = 0; i < n; ++i) {
      const int32_t key = key_at(i);
      if (pass == 0 || key >> (shift + bits) == prefix) ++histogram[(key >> shift) & (bins - 1)];
    }
    // 2. Walk down from the largest digit to the one that holds the rank.
    prefix = prefix << bits | find_digit(histogram, bins, &rank);
  }
  // 3. Of the entries equal to it, as many as the rank says; the first ones.
  int64_t position = -1;
  for (int64_t ties = rank; ties > 0;) ties -= key_at(++position) == prefix;
  return {prefix, position};
}

}  // namespace
}  // namespace distopt::cpu
