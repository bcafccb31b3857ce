// The row algorithm of the sequence log-likelihood, compiled by the C++ and the CUDA compiler alike.
//
// One row is the vocabulary of one token: x[0..V). With m = max x and s = sum exp(x - m),
//     log softmax(x)[t] = (x[t] - m) - log s           gradient: onehot(t) - exp((x - m) - log s)
// m and log s are kept apart: their sum, the log-sum-exp, would lose the digits of log s when logits are large. Any m near
// the maximum serves as well: the CPU's rows take that of their first logits where it is near enough.
//
// No torch header here: nvcc alone compiles what includes this, and a test runs it on the CPU thread by thread.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define CCA_DS_HD __host__ __device__ __forceinline__
#else
#define CCA_DS_HD inline
#endif

namespace cca_ds {

// ---- numbers ---------------------------------------------------------------------------------------------------

template <class A>
CCA_DS_HD A negative_infinity() {
  return -static_cast<A>(HUGE_VAL);
}

template <class A>
CCA_DS_HD A not_a_number() {
  return static_cast<A>(NAN);
}

// x - x is 0 for every finite x and NaN for the others.
template <class A>
CCA_DS_HD bool is_finite(A x) {
  return x - x == A(0);
}

// The larger one, and NaN where either is NaN (fmax would hide it).
template <class A>
CCA_DS_HD A nan_max(A a, A b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  A larger;  // one instruction; float is the only A of the kernels
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#else
  return (a > b || a != a) ? a : b;
#endif
}

template <class A>
CCA_DS_HD A exp_of(A x) {
#if defined(__CUDA_ARCH__)
  A power;  // as exp2f, but without the instructions that keep subnormal results, below 1e-38 of the sum
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.4426950408889634f));
  return power;
#else
  return std::exp(x);
#endif
}

// exp(x - y), where x is itself a difference.
template <class A>
CCA_DS_HD A exp_of_difference(A x, A y) {
#if defined(__CUDA_ARCH__)
  A power;  // one instruction less than exp_of(x - y), and one rounding less
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(fmaf(x, 1.4426950408889634f, -1.4426950408889634f * y)));
  return power;
#else
  return std::exp(x - y);
#endif
}

template <class A>
CCA_DS_HD A log_of(A x) {
#if defined(__CUDA_ARCH__)
  return logf(x);
#else
  return std::log(x);
#endif
}

template <class T>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename AccumulateIn<T>::type;

// An element from and to the type that sums run in. PyTorch's build switches CUDA's own conversions of 16 bits off, so the
// CUDA file says how.
template <class T>
struct Convert {
  static CCA_DS_HD accumulate_t<T> widen(T x) { return static_cast<accumulate_t<T>>(x); }
  template <class A>
  static CCA_DS_HD T narrow(A x) {
    return static_cast<T>(x);
  }
  static CCA_DS_HD uint32_t bits(T x) {
    uint32_t word = 0;
    memcpy(&word, &x, sizeof(T) < 4 ? sizeof(T) : 4);
    return word;
  }
};

template <class T>
CCA_DS_HD accumulate_t<T> widen(T x) {
  return Convert<T>::widen(x);
}

// ---- a row's running sum ---------------------------------------------------------------------------------------

template <class A>
struct RowSum {
  A max;
  A sum;  // of exp(x - max)
};

template <class A>
CCA_DS_HD RowSum<A> empty_row() {
  return {negative_infinity<A>(), A(0)};
}

// Rescales `row` to a new maximum. Two equal maxima (both -inf, say) need no exponential, and must not make a NaN.
template <class A>
CCA_DS_HD A sum_at(RowSum<A> row, A max) {
  return row.max == max ? row.sum : row.sum * exp_of(row.max - max);
}

template <class A>
CCA_DS_HD RowSum<A> merge(RowSum<A> a, RowSum<A> b) {
  const A max = nan_max(a.max, b.max);
  return {max, sum_at(a, max) + sum_at(b, max)};
}

template <class A>
struct RowStats {
  A max;
  A log_sum;
};

// A row whose maximum is not finite (+inf or NaN somewhere, or -inf everywhere) has no softmax: all of it is NaN.
template <class A>
CCA_DS_HD RowStats<A> finish(RowSum<A> row) {
  if (!is_finite(row.max)) return {not_a_number<A>(), not_a_number<A>()};
  return {row.max, log_of(row.sum)};
}

template <class A>
CCA_DS_HD A token_logp(A logit_of_target, RowStats<A> stats) {
  return (logit_of_target - stats.max) - stats.log_sum;
}

// d(weight * log p) / d logit, for a column other than the target's; the target's has `weight` added.
template <class A>
CCA_DS_HD A off_target_gradient(A logit, RowStats<A> stats, A weight) {
  return -weight * exp_of_difference(logit - stats.max, stats.log_sum);
}

CCA_DS_HD bool in_vocabulary(int64_t target, int64_t vocabulary) {
  return target >= 0 && target < vocabulary;
}

CCA_DS_HD int64_t row_offset(int64_t row, int64_t vocabulary) {
  return row * vocabulary;
}

// ---- how the threads of a block share a row --------------------------------------------------------------------

constexpr int64_t kPackBytes = 16;
constexpr int64_t kMostColumns = int64_t(1) << 30;  // of a row: columns are int, which saves registers

template <class T, int kWidth>
struct alignas(16) Pack {
  T at[kWidth];
};

// Elements of a pack: 16 bytes of the narrower of the two types (so that neither is moved in less than 16).
template <class T, class O>
CCA_DS_HD constexpr int pack_width() {
  return static_cast<int>(kPackBytes / (sizeof(T) < sizeof(O) ? sizeof(T) : sizeof(O)));
}

// A pack's share of the bias, in words of up to 16 bytes.
template <class B, int kWidth>
struct alignas(kWidth * sizeof(B) < kPackBytes ? kWidth * sizeof(B) : kPackBytes) BiasPack {
  B at[kWidth];
};

template <class P>
CCA_DS_HD bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % alignof(P) == 0;
}

// [0, head) and [tail, V) one by one, [head, tail) in packs that are aligned in both buffers and in the bias.
struct RowSplit {
  int head;
  int tail;
};

template <class T, class B, class O>
CCA_DS_HD RowSplit split_row(const T* row, const B* bias, const O* out, int vocabulary) {
  constexpr int kWidth = pack_width<T, O>();
  using Packed = Pack<T, kWidth>;
  for (int head = 0; head < kWidth && head < vocabulary; ++head) {
    const bool bias_aligned = bias == nullptr || is_aligned<BiasPack<B, kWidth>>(bias + head);
    if (bias_aligned && is_aligned<Packed>(row + head) && is_aligned<Packed>(out + head)) {
      return {head, head + (vocabulary - head) / kWidth * kWidth};
    }
  }
  return {vocabulary, vocabulary};
}

template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

// Visits what thread `thread` of `threads` owns, in a fixed order: singles(i), and packs(i, stride, Count<n>) for the n
// packs at i, i + stride, ... Four packs go together, so that four loads are on their way before the first is used.
template <int kWidth, class Packs, class Singles>
CCA_DS_HD void visit_share(RowSplit split, int vocabulary, int thread, int threads, Packs packs, Singles singles) {
  constexpr int kTogether = 4;
  const int stride = threads * kWidth;
  for (int i = thread; i < split.head; i += threads) singles(i);
  int i = split.head + thread * kWidth;
  for (; i + (kTogether - 1) * stride < split.tail; i += kTogether * stride) packs(i, stride, Count<kTogether>());
  for (; i < split.tail; i += stride) packs(i, stride, Count<1>());
  for (int k = split.tail + thread; k < vocabulary; k += threads) singles(k);
}

template <class T, class B>
CCA_DS_HD accumulate_t<T> logit_at(const T* row, const B* bias, int64_t i) {
  const accumulate_t<T> x = widen(row[i]);
  return bias == nullptr ? x : x + static_cast<accumulate_t<T>>(widen(bias[i]));
}

template <int kWidth, class T, class B>
CCA_DS_HD void widen_pack(const Pack<T, kWidth>& pack, const B* bias, int i, accumulate_t<T> (&x)[kWidth]) {
  for (int k = 0; k < kWidth; ++k) x[k] = widen(pack.at[k]);
  if (bias == nullptr) return;
  const auto added = *reinterpret_cast<const BiasPack<B, kWidth>*>(bias + i);
  for (int k = 0; k < kWidth; ++k) x[k] += static_cast<accumulate_t<T>>(widen(added.at[k]));
}

template <int kCount, int kWidth, class T>
CCA_DS_HD void load_packs(const T* row, int stride, Pack<T, kWidth> (&packs)[kCount]) {
  for (int j = 0; j < kCount; ++j) packs[j] = *reinterpret_cast<const Pack<T, kWidth>*>(row + j * stride);
}

// 16 bytes in one instruction: left to itself the compiler stores the elements one by one.
template <int kWidth, class T>
CCA_DS_HD void store_pack(T* to, const Pack<T, kWidth>& pack) {
  constexpr int kPerWord = static_cast<int>(kPackBytes / sizeof(T));
  static_assert(kWidth % kPerWord == 0 && sizeof(T) <= 4, "whole words of elements of at most four bytes");
  for (int first = 0; first < kWidth; first += kPerWord) {
    uint32_t parts[4] = {0, 0, 0, 0};
    for (int k = 0; k < kPerWord; ++k) {
      parts[k * 4 / kPerWord] |= Convert<T>::bits(pack.at[first + k]) << (8 * sizeof(T) * k % 32);
    }
#if defined(__CUDA_ARCH__)
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to + first), "r"(parts[0]), "r"(parts[1]),
                 "r"(parts[2]), "r"(parts[3])
                 : "memory");
#else
    memcpy(to + first, parts, kPackBytes);
#endif
  }
}

// The sum over one thread's share of a row. `B` is the bias's type; a null bias is none.
template <class T, class B>
CCA_DS_HD RowSum<accumulate_t<T>> thread_row_sum(const T* row, const B* bias, int vocabulary, int thread, int threads) {
  using A = accumulate_t<T>;
  constexpr int kWidth = pack_width<T, T>();
  RowSum<A> sum = empty_row<A>();
  const auto absorb_one = [&](int i) { sum = merge(sum, RowSum<A>{logit_at(row, bias, i), A(1)}); };
  const auto absorb_packs = [&](int i, int stride, auto count) {
    constexpr int kCount = decltype(count)::value;
    Pack<T, kWidth> packs[kCount];
    load_packs(row + i, stride, packs);
    A max = sum.max;
    for (int j = 0; j < kCount; ++j) {
      A x[kWidth];
      widen_pack(packs[j], bias, i + j * stride, x);
      for (int k = 0; k < kWidth; ++k) max = nan_max(max, x[k]);
    }
    if (max == negative_infinity<A>()) return;  // nothing but -inf so far: the sum stays 0
    A total = sum_at(sum, max);
    for (int j = 0; j < kCount; ++j) {
      A x[kWidth];
      widen_pack(packs[j], bias, i + j * stride, x);
      for (int k = 0; k < kWidth; ++k) total += exp_of(x[k] - max);
    }
    sum = {max, total};
  };
  visit_share<kWidth>(split_row(row, bias, row, vocabulary), vocabulary, thread, threads, absorb_packs, absorb_one);
  return sum;
}

// Writes one thread's share of weight * (onehot - softmax). `out` may be `row` itself: each element is read before it
// is written, by the thread that owns it.
template <class T, class B, class O>
CCA_DS_HD void thread_row_gradient(const T* row, const B* bias, O* out, int vocabulary, int64_t target,
                                   RowStats<accumulate_t<T>> stats, accumulate_t<T> weight, int thread, int threads) {
  using A = accumulate_t<T>;
  constexpr int kWidth = pack_width<T, O>();
  const int column = in_vocabulary(target, vocabulary) ? static_cast<int>(target) : -1;
  const auto off_target = [&](A x) { return off_target_gradient(x, stats, weight); };
  const auto write_one = [&](int i) {
    const A other = off_target(logit_at(row, bias, i));
    out[i] = Convert<O>::narrow(i == column ? weight + other : other);
  };
  const auto write_packs = [&](int first, int stride, auto count) {
    constexpr int kCount = decltype(count)::value;
    Pack<T, kWidth> packs[kCount];
    load_packs(row + first, stride, packs);
    for (int j = 0; j < kCount; ++j) {
      const int i = first + j * stride;
      A x[kWidth];
      widen_pack(packs[j], bias, i, x);
      for (int k = 0; k < kWidth; ++k) x[k] = off_target(x[k]);
      const int at = column - i;
      if (at >= 0 && at < kWidth) {  // one comparison a pack; the index into x must stay a constant
        for (int k = 0; k < kWidth; ++k) x[k] = k == at ? weight + x[k] : x[k];
      }
      Pack<O, kWidth> written;
      for (int k = 0; k < kWidth; ++k) written.at[k] = Convert<O>::narrow(x[k]);
      store_pack(out + i, written);
    }
  };
  visit_share<kWidth>(split_row(row, bias, out, vocabulary), vocabulary, thread, threads, write_packs, write_one);
}

// Adds up the partial sums of a power-of-two group by halving: `partner(sum, distance)` fetches the sum of the lane
// that many places above. The order depends on nothing but the group's size.
template <class A, class Partner>
CCA_DS_HD RowSum<A> reduce_lanes(RowSum<A> sum, int lanes, Partner partner) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) sum = merge(sum, partner(sum, distance));
  return sum;
}

}  // namespace cca_ds
