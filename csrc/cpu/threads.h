// The threads that a caller lends for one call: the kernels start none of their own and know no thread library.
//
// Results never depend on how many there are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace distopt::cpu {

class Threads {
 public:
  using Task = void (*)(void* context, int64_t i);
  // Calls task(context, i) once for each i in [0, num_tasks), on any thread and in any order; returns when all are
  // done.
  using Run = void (*)(int64_t num_tasks, Task task, void* context);

  Threads() = default;  // the calling thread alone
  Threads(int64_t count, Run run) : count_(run ? std::max<int64_t>(count, 1) : 1), run_(run) {}

  int64_t count() const { return count_; }

  template <class F>
  void each(int64_t num_tasks, F&& f) const {
    if (num_tasks > 1 && count_ > 1) {
      run_(num_tasks, [](void* context, int64_t i) { (*static_cast<std::remove_reference_t<F>*>(context))(i); }, &f);
    } else {
      for (int64_t i = 0; i < num_tasks; ++i) f(i);
    }
  }

 private:
  int64_t count_ = 1;
  Run run_ = nullptr;
};

}  // namespace distopt::cpu
