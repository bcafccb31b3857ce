// CPU kernels of the sequence log-likelihood. Compiled once per instruction set (plain, AVX2, AVX-512), each into a
// library of its own; ops/library.py loads the one that PyTorch itself dispatches to.
//
// Letters: N rows, V vocabulary, B sequences of N / B rows. Rows of logits may be further apart than V in the two kernels
// that take a chunk of them.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "likelihood/huge_pages.h"
#include "cpu/vector_math.h"

namespace cca_ds {
namespace {

using at::Tensor;

// A block is read twice, for its maximum and for its sum, the second time from the first-level cache.
constexpr int64_t kBlock = 2048;

template <class A>
struct Maximum {
  Vectorized<A> a{negative_infinity<A>()}, b{negative_infinity<A>()};
  void absorb(Two<A> x) {
    a = at::vec::maximum(a, x.a);  // keeps NaN
    b = at::vec::maximum(b, x.b);
  }
  A value() const { return largest(at::vec::maximum(a, b)); }
};

template <class Row>
typename Row::A largest_logit(const Row& row, int64_t begin, int64_t end, int64_t step) {
  Maximum<typename Row::A> maximum, other;
  int64_t i = begin;
  for (; i + 2 * step <= end; i += 2 * step) {
    maximum.absorb(row.full(i));
    other.absorb(row.full(i + step));
  }
  visit_steps(row, i, end, step, [&](int64_t, auto x, int64_t) { maximum.absorb(x); });
  return nan_max(maximum.value(), other.value());
}

// visit(step's first element, exp(its logits - shift)) over [begin, end), and the sum of what it was given.
template <class T, class Row, class Visit>
typename Row::A sum_of_powers(const Row& row, int64_t begin, int64_t end, typename Row::A shift, Visit visit) {
  using A = typename Row::A;
  const Vectorized<A> shift_vector(shift);
  Vectorized<A> sum_a(A(0)), sum_b(A(0));
  visit_steps(row, begin, end, step_of<T>(), [&](int64_t i, auto x, int64_t) {
    const Two<A> power{exp_of(x.a - shift_vector), exp_of(x.b - shift_vector)};
    sum_a = sum_a + power.a;
    sum_b = sum_b + power.b;
    visit(i, power);
  });
  return total(sum_a + sum_b);
}

// The largest of a row's first logits is nearly always as good a shift as the row's maximum: it keeps the sum between 1
// and `kLargestSum`, and the row need not be read for a maximum first. False (for NaN and infinities too) where it is not.
constexpr int64_t kFirst = 512;
constexpr double kLargestSum = 1e6;

template <class A>
bool good_shift(A shift, A sum) {
  return is_finite(shift) && sum <= A(kLargestSum);
}

// Online softmax, one block at a time: one pass over the memory.
template <class T, class Row>
RowSum<typename Row::A> row_sum(const Row& row, int64_t vocabulary) {
  using A = typename Row::A;
  const auto nothing = [](int64_t, auto) {};
  const A shift = largest_logit(row, 0, std::min(kFirst, vocabulary), step_of<T>());
  const A sum = is_finite(shift) ? sum_of_powers<T>(row, 0, vocabulary, shift, nothing) : A(0);
  if (good_shift(shift, sum)) return {shift, sum};
  RowSum<A> so_far = empty_row<A>();
  for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, vocabulary);
    const A max = nan_max(so_far.max, largest_logit(row, begin, end, step_of<T>()));
    if (max == negative_infinity<A>()) continue;
    if (!is_finite(max)) return {max, not_a_number<A>()};
    so_far = {max, sum_at(so_far, max) + sum_of_powers<T>(row, begin, end, max, nothing)};
  }
  return so_far;
}

template <class T, class Row>
void row_gradient(const Row& row, T* out, int64_t vocabulary, int64_t target, RowStats<typename Row::A> stats,
                  typename Row::A weight) {
  using A = typename Row::A;
  if (!is_finite(stats.max)) {
    std::fill(out, out + vocabulary, static_cast<T>(not_a_number<A>()));
    return;
  }
  const A at_target = weight + off_target_gradient(row.one(target), stats, weight);
  const Vectorized<A> shift(stats.max), scale(-weight * std::exp(-stats.log_sum));
  visit_steps(row, 0, vocabulary, step_of<T>(), [&](int64_t i, auto x, int64_t count) {
    const Two<A> gradient{exp_of(x.a - shift) * scale, exp_of(x.b - shift) * scale};
    store_step(out + i, gradient, count, target - i, at_target);
  });
}

// onehot - softmax with one exponential an element: exp(x - shift) waits in `scratch` for its sum. `out` may be the
// logits themselves.
template <class T, class O, class Row>
typename Row::A row_residual(const Row& row, typename Row::A* scratch, O* out, int64_t vocabulary, int64_t target) {
  using A = typename Row::A;
  const A logit_of_target = row.one(target);
  const auto keep = [&](int64_t i, auto power) { store_two(scratch + i, power); };  // has room for a whole last step
  A shift = largest_logit(row, 0, std::min(kFirst, vocabulary), step_of<T>());
  A sum = is_finite(shift) ? sum_of_powers<T>(row, 0, vocabulary, shift, keep) : A(0);
  if (!good_shift(shift, sum)) {
    shift = largest_logit(row, 0, vocabulary, step_of<T>());
    if (!is_finite(shift)) {
      std::fill(out, out + vocabulary, static_cast<O>(not_a_number<A>()));
      return not_a_number<A>();
    }
    sum = sum_of_powers<T>(row, 0, vocabulary, shift, keep);
  }
  const RowStats<A> stats = finish(RowSum<A>{shift, sum});
  const Vectorized<A> scale(-std::exp(-stats.log_sum));
  const LogitRow<A, A, false> powers{scratch, nullptr};
  const A at_target = A(1) + off_target_gradient(logit_of_target, stats, A(1));
  visit_steps(powers, 0, vocabulary, step_of<T>(), [&](int64_t i, auto power, int64_t count) {
    store_step(out + i, Two<A>{power.a * scale, power.b * scale}, count, target - i, at_target);
  });
  return token_logp(logit_of_target, stats);
}

void check_targets(const Tensor& targets_N, int64_t vocabulary) {
  const int64_t* targets = targets_N.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < targets_N.numel(); ++n) {
    TORCH_CHECK_VALUE(in_vocabulary(targets[n], vocabulary), "target ", targets[n], " in row ", n,
                      " lies outside the vocabulary of ", vocabulary, "; targets must be from 0 to ", vocabulary - 1);
  }
}

int64_t grain(int64_t vocabulary) {
  return std::max<int64_t>(1, at::internal::GRAIN_SIZE / std::max<int64_t>(1, vocabulary));
}

// run(row's type, bias or other type, has bias) for the logits' type and, where it differs, the type of `other`.
template <class T, class F>
void with_other(at::ScalarType other, F run) {
  if (other == c10::CppTypeToScalarType<T>::value) return run(T());
  if constexpr (std::is_same_v<T, float>) {
    if (other == at::kBFloat16) return run(at::BFloat16());
    if (other == at::kHalf) return run(at::Half());
  }
  TORCH_CHECK(false, "no kernel for ", c10::CppTypeToScalarType<T>::value, " logits with ", other);
}

template <class F>
void with_types(const Tensor& logits, at::ScalarType other, F run) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "cca_ds", [&] {
    using T = scalar_t;
    with_other<T>(other, [&](auto b) { run(T(), b); });
  });
}

at::TensorOptions stats_options(const Tensor& logits) {
  return logits.options().dtype(logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

std::tuple<Tensor, Tensor> row_stats_cpu(const Tensor& logits_NV, const std::optional<Tensor>& bias_V,
                                         const Tensor& targets_N) {
  const int64_t rows = logits_NV.size(0), vocabulary = logits_NV.size(1);
  check_targets(targets_N, vocabulary);
  Tensor logp_N = at::empty({rows}, stats_options(logits_NV)), stats_N2 = at::empty({rows, 2}, stats_options(logits_NV));
  const int64_t* targets = targets_N.const_data_ptr<int64_t>();
  with_types(logits_NV, bias_V ? bias_V->scalar_type() : logits_NV.scalar_type(), [&](auto t, auto b) {
    using T = decltype(t);
    using B = decltype(b);
    using A = accumulate_t<T>;
    const T* logits = logits_NV.const_data_ptr<T>();
    const B* bias = bias_V ? bias_V->const_data_ptr<B>() : nullptr;
    A *logp = logp_N.data_ptr<A>(), *stats_out = stats_N2.data_ptr<A>();
    const auto one_row = [&](auto row, int64_t n) {
      const RowStats<A> stats = finish(row_sum<T>(row, vocabulary));
      logp[n] = token_logp(row.one(targets[n]), stats);
      stats_out[2 * n] = stats.max;
      stats_out[2 * n + 1] = stats.log_sum;
    };
    at::parallel_for(0, rows, grain(vocabulary), [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        const T* row = logits + row_offset(n, logits_NV.stride(0));
        bias ? one_row(LogitRow<T, B, true>{row, bias}, n) : one_row(LogitRow<T, B, false>{row, nullptr}, n);
      }
    });
  });
  return {logp_N, stats_N2};
}

Tensor row_gradient_cpu(const Tensor& grad_B, const Tensor& logits_NV, const Tensor& targets_N, const Tensor& stats_N2) {
  const int64_t rows = logits_NV.size(0), vocabulary = logits_NV.size(1);
  check_targets(targets_N, vocabulary);
  const int64_t rows_per_sequence = grad_B.numel() == 0 ? 1 : std::max<int64_t>(1, rows / grad_B.numel());
  Tensor out_NV = on_huge_pages(at::empty_like(logits_NV));
  const int64_t* targets = targets_N.const_data_ptr<int64_t>();
  with_types(logits_NV, logits_NV.scalar_type(), [&](auto t, auto) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    const T* logits = logits_NV.const_data_ptr<T>();
    const A *stats = stats_N2.const_data_ptr<A>(), *grad = grad_B.const_data_ptr<A>();
    T* out = out_NV.data_ptr<T>();
    at::parallel_for(0, rows, grain(vocabulary), [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        const int64_t offset = row_offset(n, vocabulary);
        row_gradient(LogitRow<T, T, false>{logits + offset, nullptr}, out + offset, vocabulary, targets[n],
                     RowStats<A>{stats[2 * n], stats[2 * n + 1]}, grad[n / rows_per_sequence]);
      }
    });
  });
  return out_NV;
}

Tensor row_residual_cpu(const Tensor& logits_NV, const std::optional<Tensor>& bias_V, const Tensor& targets_N,
                        Tensor residual_NV) {
  const int64_t rows = logits_NV.size(0), vocabulary = logits_NV.size(1);
  check_targets(targets_N, vocabulary);
  Tensor logp_N = at::empty({rows}, stats_options(logits_NV));
  const int64_t* targets = targets_N.const_data_ptr<int64_t>();
  with_types(logits_NV, residual_NV.scalar_type(), [&](auto t, auto o) {
    using T = decltype(t);
    using O = decltype(o);
    using A = accumulate_t<T>;
    const T* logits = logits_NV.const_data_ptr<T>();
    const O* bias = bias_V ? bias_V->const_data_ptr<O>() : nullptr;
    O* out = residual_NV.data_ptr<O>();
    A* logp = logp_N.data_ptr<A>();
    at::parallel_for(0, rows, grain(vocabulary), [&](int64_t first, int64_t last) {
      std::vector<A> scratch(vocabulary + step_of<T>());
      const auto one_row = [&](auto row, int64_t n) {
        logp[n] = row_residual<T>(row, scratch.data(), out + row_offset(n, vocabulary), vocabulary, targets[n]);
      };
      for (int64_t n = first; n < last; ++n) {
        const T* row = logits + row_offset(n, logits_NV.stride(0));
        bias ? one_row(LogitRow<T, O, true>{row, bias}, n) : one_row(LogitRow<T, O, false>{row, nullptr}, n);
      }
    });
  });
  return logp_N;
}

TORCH_LIBRARY_IMPL(cca_ds, CPU, m) {
  m.impl("row_stats", row_stats_cpu);
  m.impl("row_gradient", row_gradient_cpu);
  m.impl("row_residual", row_residual_cpu);
}

}  // namespace
}  // namespace cca_ds
