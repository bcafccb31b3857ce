// What at::vec lacks for the CPU kernels: any element type as a pair of accumulator vectors, and a short exponential.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <type_traits>

#include "likelihood/sequence_logp.h"

namespace cca_ds {

using at::vec::Vectorized;

// exp(x) to two or three units in the last place for x <= 0, as 2^n 2^f with f in [-1/2, 1/2]. Below -87 (-104 with
// AVX-512) it is exactly 0; above 0 it is as good until it becomes inf; NaN stays NaN.
inline Vectorized<float> exp_of(Vectorized<float> x) {
  const Vectorized<float> log2_e(1.44269502f);
#if defined(CPU_CAPABILITY_AVX512)
  const auto clamped = at::vec::clamp_min(x, Vectorized<float>(-104.0f));
#else
  const Vectorized<float> lowest(-87.0f);
  const auto clamped = at::vec::clamp_max(at::vec::clamp_min(x, lowest), Vectorized<float>(89.0f));
#endif
  const auto n = (clamped * log2_e).round();
  const auto f = at::vec::fmadd(clamped, log2_e, n.neg());
  Vectorized<float> power(1.32647273e-3f);
  for (const float coefficient : {9.67151299e-3f, 5.55073358e-2f, 2.40222424e-1f, 6.93147004e-1f, 1.0f}) {
    power = at::vec::fmadd(power, f, Vectorized<float>(coefficient));
  }
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_scalef_ps(power, n);
#else
  const auto exponent = (at::vec::convert_to_int_of_same_size(n) + Vectorized<int32_t>(127)) << Vectorized<int32_t>(23);
  const auto scaled = power * at::vec::cast<float, int32_t>(exponent);
  return Vectorized<float>::blendv(scaled, Vectorized<float>(0.0f), x < lowest);
#endif
}

inline Vectorized<double> exp_of(Vectorized<double> x) {
  return x.exp();
}

template <>
struct AccumulateIn<at::BFloat16> {
  using type = float;
};

template <class A>
struct Two {
  Vectorized<A> a, b;
};

// Elements handled in one step: two vectors of accumulators.
template <class T>
constexpr int64_t step_of() {
  return 2 * Vectorized<accumulate_t<T>>::size();
}

template <class T>
inline Two<accumulate_t<T>> load_two(const T* from) {
  if constexpr (std::is_same_v<T, accumulate_t<T>>) {
    return {Vectorized<T>::loadu(from), Vectorized<T>::loadu(from + Vectorized<T>::size())};
  } else {
    const auto [a, b] = at::vec::convert_to_float<T>(Vectorized<T>::loadu(from));
    return {a, b};
  }
}

template <class T>
inline void store_two(T* to, Two<accumulate_t<T>> x) {
  if constexpr (std::is_same_v<T, accumulate_t<T>>) {
    x.a.store(to);
    x.b.store(to + Vectorized<T>::size());
  } else {
    at::vec::convert_from_float<T>(x.a, x.b).store(to);
  }
}

// A row of logits, with a bias of type B added where there is one.
template <class T, class B, bool kBias>
struct LogitRow {
  const T* logits;
  const B* bias;

  using A = accumulate_t<T>;

  // The processor's own prefetcher stops at each page and is too late for a loop that also writes.
  Two<A> full(int64_t i) const {
    constexpr int64_t kAheadBytes = 4096, kLineBytes = 64, kStepBytes = step_of<T>() * sizeof(T);
    const char* ahead = reinterpret_cast<const char*>(logits + i) + kAheadBytes;
    for (int64_t line = 0; line < kStepBytes; line += kLineBytes) __builtin_prefetch(ahead + line);
    auto x = load_two(logits + i);
    if constexpr (kBias) {
      const auto y = load_two(bias + i);
      x = {x.a + y.a, x.b + y.b};
    }
    return x;
  }

  // The last, incomplete step: filled up with -inf, which adds nothing to a maximum or to a sum of exponentials.
  Two<A> partial(int64_t i, int64_t count) const {
    A filled[step_of<T>()];
    std::fill(filled, filled + step_of<T>(), -std::numeric_limits<A>::infinity());
    for (int64_t k = 0; k < count; ++k) filled[k] = one(i + k);
    return load_two(filled);
  }

  A one(int64_t i) const {
    return logit_at(logits, kBias ? bias : nullptr, i);
  }
};

// Stores one step of a gradient: `count` elements of it, with `at_target` where the target is among them.
template <class T>
inline void store_step(T* to, Two<accumulate_t<T>> x, int64_t count, int64_t target, accumulate_t<T> at_target) {
  const bool has_target = static_cast<uint64_t>(target) < static_cast<uint64_t>(count);
  if (count == step_of<T>() && !has_target) {
    store_two(to, x);
    return;
  }
  T all[step_of<T>()];
  store_two(all, x);
  if (has_target) all[target] = static_cast<T>(at_target);
  std::copy(all, all + count, to);
}

// visit(step's first element, its logits, elements that count) over [begin, end) of a row.
template <class Row, class Visit>
inline void visit_steps(const Row& row, int64_t begin, int64_t end, int64_t step, Visit visit) {
  int64_t i = begin;
  for (; i + step <= end; i += step) visit(i, row.full(i), step);
  if (i < end) visit(i, row.partial(i, end - i), end - i);
}

template <class A>
inline A largest(Vectorized<A> x) {
  A lanes[Vectorized<A>::size()];
  x.store(lanes);
  return std::accumulate(lanes, lanes + Vectorized<A>::size(), negative_infinity<A>(), nan_max<A>);
}

template <class A>
inline A total(Vectorized<A> x) {
  A lanes[Vectorized<A>::size()];
  x.store(lanes);
  return std::accumulate(lanes, lanes + Vectorized<A>::size(), A(0));
}

// run(number of the type) for float32 and bf16.
template <class F>
void with_float_type(at::ScalarType type, F run) {
  switch (type) {
    case at::kFloat:
      return run(float());
    case at::kBFloat16:
      return run(at::BFloat16());
    default:
      TORCH_CHECK(false, "the passes of a training step take float32 and bf16, not ", type);
  }
}

}  // namespace cca_ds
