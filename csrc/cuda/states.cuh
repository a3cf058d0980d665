// Reading, updating and emptying the states of one entry or of one slot of entries.
#pragma once

#include "elements.cuh"
#include "geometry.cuh"

namespace distopt::cuda {

// The flat tensors of a job with their types.
template <Update kUpdate, class G, class S>
struct States {
  const G* grad;
  S* u;
  S* v;
  float momentum;

  static constexpr bool kVelocity = has_velocity(kUpdate);

  DISTOPT_HD explicit States(const Sparsify& job)
      : grad(static_cast<const G*>(job.grad)),
        u(static_cast<S*>(job.u)),
        v(static_cast<S*>(job.v)),
        momentum(job.momentum) {}

  // The key of the new v; nothing is written. Not rounded to a 16-bit v: a bound need not be exact.
  __device__ int32_t new_key(int64_t in_grad, int64_t in_state) const {
    float g = 0, u_i = 0, v_i = widen(v[in_state]);
    if constexpr (kUpdate != Update::kNone) g = widen(grad[in_grad]);
    if constexpr (kVelocity) u_i = widen(u[in_state]);
    update<kUpdate>(g, u_i, v_i, momentum);
    return key_of(v_i);
  }

  // Updates one entry; the key of what v now holds.
  __device__ int32_t step(int64_t in_grad, int64_t in_state) const {
    if constexpr (kUpdate == Update::kNone) {
      return key_of(widen(v[in_state]));
    } else {
      const float g = widen(grad[in_grad]);
      float u_i = 0, v_i = widen(v[in_state]);
      if constexpr (kVelocity) u_i = widen(u[in_state]);
      update<kUpdate>(g, u_i, v_i, momentum);
      if constexpr (kVelocity) u[in_state] = narrow<S>(u_i);
      const S stored = narrow<S>(v_i);
      v[in_state] = stored;
      return key_of(widen(stored));
    }
  }
};

// Some entries that are loaded or stored by one instruction.
template <class T>
struct alignas(kSlot * sizeof(T)) Slot {
  T at[kSlot];
};

template <class T>
__device__ inline bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Slot<T>) == 0;
}

template <class T>
__device__ inline Slot<T> load_slot(const T* p, bool aligned) {
  if (aligned) return *reinterpret_cast<const Slot<T>*>(p);
  Slot<T> slot;
#pragma unroll
  for (int c = 0; c < kSlot; ++c) slot.at[c] = p[c];
  return slot;
}

// Hands a selected entry to the result and, where the job updates, takes it out of the states.
template <Update kUpdate, class S>
struct Taker {
  S* u;  // nullptr keeps it
  S* v;
  void* values;
  int32_t* indices;

  DISTOPT_HD explicit Taker(const Sparsify& job)
      : u(job.masking ? static_cast<S*>(job.u) : nullptr),
        v(static_cast<S*>(job.v)),
        values(job.values),
        indices(job.indices) {}

  __device__ void take(int64_t in_result, int64_t in_grad, int64_t in_state) const {
    indices[in_result] = static_cast<int32_t>(in_grad);
    if constexpr (kUpdate == Update::kNone) {
      static_cast<S*>(values)[in_result] = v[in_state];
    } else {
      static_cast<float*>(values)[in_result] = widen(v[in_state]);
      v[in_state] = S{};
      if constexpr (has_velocity(kUpdate)) {
        if (u) u[in_state] = S{};
      }
    }
  }
};

}  // namespace distopt::cuda
