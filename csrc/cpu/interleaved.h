// Of each residue class x[owner::num_owners] the k entries of largest magnitude, reading x once: what each rank sends
// to each owner of a balanced exchange.
//
// One bound from a sample serves all classes; it leaves a margin for the class that has the fewest. What passes goes to
// its owner's buffer, which is cut when full; an owner that got too few makes a second collection necessary.
// Limits: n < 2^31.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace distopt::cpu {

// values and indices: (num_owners, k), rows in order of the owners, ascending inside a row; indices count within the
// class. num_owners >= 1, k in [0, n / num_owners]. values have the dtype of x.
void topk_interleaved(const void* x, DType dtype, int64_t n, int64_t k, int64_t num_owners, void* values,
                      int32_t* indices);

}  // namespace distopt::cpu
