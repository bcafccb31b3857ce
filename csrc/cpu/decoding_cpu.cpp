// A decoding step on a CPU: x W^T for few rows, and attention of one query. Weights and cache are all there is to read,
// and what serves many rows or queries reads them at a fraction of the memory's speed. Compiled once per instruction set.
//
// Letters: R rows, F output width, D width, H heads, S live slots of the cache, C channels of a head.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "cpu/vector_math.h"

#define CCA_DS_UNROLL _Pragma("GCC unroll 8")

namespace cca_ds {
namespace {

using at::Tensor;

constexpr int64_t kRowsAtOnce = 8;
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kOutputs = 3;  // 3 x 8 sums, 3 weights and a row fit the 32 registers
#else
constexpr int kOutputs = 1;
#endif

// Loaded once, where the compiler would load it again for each use.
inline Vectorized<float> in_register(const float* from) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__GNUC__)
  __m512 held = _mm512_loadu_ps(from);
  __asm__("" : "+v"(held));
  return held;
#else
  return Vectorized<float>::loadu(from);
#endif
}

// out[r, j] = x[r] . weight[j] for kRows rows and kCount neighbouring outputs, in an order that depends on neither count:
// a row's result is the same bits whatever it is computed with.
template <int kRows, int kCount, class T>
void dot_products(const float* x, const T* weight, int64_t width, float (&out)[kRows][kCount]) {
  constexpr int64_t kStep = step_of<T>(), kHalf = kStep / 2;
  Vectorized<float> sums[kRows][kCount];  // in registers: the loops over them must be unrolled
  CCA_DS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    CCA_DS_UNROLL
    for (int j = 0; j < kCount; ++j) sums[r][j] = Vectorized<float>(0.0f);
  }
  int64_t i = 0;
  for (; i + kStep <= width; i += kStep) {
    Two<float> w[kCount];
    CCA_DS_UNROLL
    for (int j = 0; j < kCount; ++j) {
      const T* from = weight + j * width + i;
      const char* next = reinterpret_cast<const char*>(from + kCount * width);  // the same place of the next outputs
      for (int64_t line = 0; line < kStep * int64_t(sizeof(T)); line += 64) __builtin_prefetch(next + line);
      w[j] = load_two(from);
    }
    CCA_DS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const auto a = in_register(x + r * width + i), b = in_register(x + r * width + i + kHalf);
      CCA_DS_UNROLL
      for (int j = 0; j < kCount; ++j) {
        sums[r][j] = at::vec::fmadd(b, w[j].b, at::vec::fmadd(a, w[j].a, sums[r][j]));
      }
    }
  }
  CCA_DS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    CCA_DS_UNROLL
    for (int j = 0; j < kCount; ++j) {
      out[r][j] = at::vec::vec_reduce_all<float>([](auto& p, auto& q) { return p + q; }, sums[r][j]);
      for (int64_t k = i; k < width; ++k) {
        // one rounding, whatever kRows: the compiler contracts a product and a sum in some instances only
        out[r][j] = std::fma(x[r * width + k], static_cast<float>(weight[j * width + k]), out[r][j]);
      }
    }
  }
}

template <int kRows, int kCount, class T, class O>
void write_outputs(const float* x, const T* weight, const T* bias, O* out, int64_t width, int64_t outputs, int64_t first) {
  float sums[kRows][kCount];
  dot_products<kRows, kCount>(x, weight + first * width, width, sums);
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kCount; ++j) {
      const float shift = bias ? static_cast<float>(bias[first + j]) : 0.0f;
      out[r * outputs + first + j] = static_cast<O>(sums[r][j] + shift);
    }
  }
}

// [first, last) of the outputs, for `rows` <= kRows rows.
template <int kRows, class T, class O>
void write_range(int64_t rows, const float* x, const T* weight, const T* bias, O* out, int64_t width, int64_t outputs,
                 int64_t first, int64_t last) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return write_range<kRows - 1>(rows, x, weight, bias, out, width, outputs, first, last);
  }
  for (; first + kOutputs <= last; first += kOutputs) {
    write_outputs<kRows, kOutputs>(x, weight, bias, out, width, outputs, first);
  }
  for (; first < last; ++first) write_outputs<kRows, 1>(x, weight, bias, out, width, outputs, first);
}

template <class T>
void write_all(const Tensor& x_RD, const Tensor& weight_FD, const Tensor& bias_F, Tensor& out_RF) {
  const int64_t rows = x_RD.size(0), width = x_RD.size(1), outputs = weight_FD.size(0);
  const float* x = x_RD.const_data_ptr<float>();
  const T* weight = weight_FD.const_data_ptr<T>();
  const T* bias = bias_F.defined() ? bias_F.const_data_ptr<T>() : nullptr;
  T* out = out_RF.data_ptr<T>();
  const int64_t grain = std::max<int64_t>(16, (int64_t(1) << 15) / std::max<int64_t>(1, width));
  at::parallel_for(0, outputs, grain, [&](int64_t first, int64_t last) {
    for (int64_t r = 0; r < rows; r += kRowsAtOnce) {
      write_range<kRowsAtOnce>(std::min(kRowsAtOnce, rows - r), x + r * width, weight, bias, out + r * outputs, width,
                               outputs, first, last);
    }
  });
}

Tensor few_rows_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  TORCH_CHECK(x.size(-1) == weight.size(1), "rows of width ", x.size(-1), " do not fit a weight of ", weight.sizes());
  TORCH_CHECK(!bias || bias->numel() == weight.size(0), "a weight of ", weight.sizes(), " takes ", weight.size(0),
              " biases, not ", bias->numel());
  const Tensor x_RD = x.reshape({-1, weight.size(1)}).to(at::kFloat).contiguous();
  const Tensor weight_FD = weight.contiguous(), bias_F = bias ? bias->contiguous() : Tensor();
  Tensor out_RF = at::empty({x_RD.size(0), weight.size(0)}, weight.options());
  switch (weight.scalar_type()) {
    case at::kFloat:
      write_all<float>(x_RD, weight_FD, bias_F, out_RF);
      break;
    case at::kBFloat16:
      write_all<at::BFloat16>(x_RD, weight_FD, bias_F, out_RF);
      break;
    case at::kHalf:
      write_all<at::Half>(x_RD, weight_FD, bias_F, out_RF);
      break;
    default:
      TORCH_CHECK(false, "few_rows_linear takes float32, bf16 and fp16, not ", weight.scalar_type());
  }
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  return out_RF.view(shape);
}

// scores[s] = softmax(scores)[s], in place.
void softmax(float* scores, int64_t slots) {
  const float max = *std::max_element(scores, scores + slots);
  const Vectorized<float> shift(max);
  constexpr int64_t kLanes = Vectorized<float>::size();
  float sum = 0.0f;
  int64_t s = 0;
  for (; s + kLanes <= slots; s += kLanes) {
    const auto power = exp_of(Vectorized<float>::loadu(scores + s) - shift);
    power.store(scores + s);
    sum += at::vec::vec_reduce_all<float>([](auto& p, auto& q) { return p + q; }, power);
  }
  for (; s < slots; ++s) sum += scores[s] = std::exp(scores[s] - max);
  const float scale = 1.0f / sum;
  for (s = 0; s < slots; ++s) scores[s] *= scale;
}

// out = sum_s weights[s] values[s] over rows of `channels`.
template <class T>
void weighted_sum(const float* weights, const T* values, int64_t slots, int64_t channels, T* out) {
  constexpr int64_t kStep = step_of<T>();
  int64_t i = 0;
  for (; i + kStep <= channels; i += kStep) {
    Two<float> sum{Vectorized<float>(0.0f), Vectorized<float>(0.0f)};
    for (int64_t s = 0; s < slots; ++s) {
      const auto value = load_two(values + s * channels + i);
      const Vectorized<float> weight(weights[s]);
      sum = {at::vec::fmadd(weight, value.a, sum.a), at::vec::fmadd(weight, value.b, sum.b)};
    }
    store_two(out + i, sum);
  }
  for (; i < channels; ++i) {
    float sum = 0.0f;
    for (int64_t s = 0; s < slots; ++s) sum += weights[s] * static_cast<float>(values[s * channels + i]);
    out[i] = static_cast<T>(sum);
  }
}

template <class T>
void attend(const Tensor& q_MC, const Tensor& keys, const Tensor& values, Tensor& out_MC) {
  const int64_t heads = keys.size(1), slots = keys.size(2), channels = keys.size(3);
  const float* q = q_MC.const_data_ptr<float>();
  at::parallel_for(0, q_MC.size(0), 1, [&](int64_t first, int64_t last) {
    std::vector<float> scores(slots);
    for (int64_t m = first; m < last; ++m) {
      const auto of_head = [&](const Tensor& cache) {
        return cache.const_data_ptr<T>() + m / heads * cache.stride(0) + m % heads * cache.stride(1);
      };
      write_range<1>(1, q + m * channels, of_head(keys), static_cast<const T*>(nullptr), scores.data(), channels, slots, 0,
                     slots);
      softmax(scores.data(), slots);
      weighted_sum(scores.data(), of_head(values), slots, channels, out_MC.data_ptr<T>() + m * channels);
    }
  });
}

Tensor one_query_attention(const Tensor& query, const Tensor& keys, const Tensor& values, double scale) {
  const int64_t slots = keys.size(2), channels = keys.size(3);
  for (const Tensor& cache : {keys, values}) {
    TORCH_CHECK(cache.stride(3) == 1 && cache.stride(2) == channels, "a head's slots must lie one after another");
  }
  TORCH_CHECK(slots > 0 && values.sizes() == keys.sizes(), "keys ", keys.sizes(), " and values ", values.sizes(),
              " must be alike, with at least one slot");
  TORCH_CHECK(query.sizes() == at::IntArrayRef({keys.size(0), keys.size(1), 1, channels}), "a query of ", query.sizes(),
              " does not fit keys of ", keys.sizes(), ": give one position for each head");
  const Tensor q_MC = query.reshape({-1, channels}).to(at::kFloat).mul(scale);
  Tensor out_MC = at::empty({q_MC.size(0), channels}, keys.options());
  switch (keys.scalar_type()) {
    case at::kFloat:
      attend<float>(q_MC, keys, values, out_MC);
      break;
    case at::kBFloat16:
      attend<at::BFloat16>(q_MC, keys, values, out_MC);
      break;
    case at::kHalf:
      attend<at::Half>(q_MC, keys, values, out_MC);
      break;
    default:
      TORCH_CHECK(false, "one_query_attention takes float32, bf16 and fp16, not ", keys.scalar_type());
  }
  return out_MC.view(query.sizes());
}

TORCH_LIBRARY_IMPL(cca_ds, CPU, m) {
  m.impl("few_rows_linear", few_rows_linear);
  m.impl("one_query_attention", one_query_attention);
}

}  // namespace
}  // namespace cca_ds
