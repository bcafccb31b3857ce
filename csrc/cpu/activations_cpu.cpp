// The activations of a training step on a CPU, each one pass over its tensors. PyTorch's own take as long as the matrix
// products of the same layer: an exact tanh for each element of a GELU, and five passes for the two gradients of SwiGLU.
// Compiled once per instruction set.
//
//     gelu(x) = x s(t(x)), its tanh form       t(x) = x (k + m x^2)       s(t) = 1 / (1 + exp(-t))
//     swiglu(g, v) = g s(g) v                   d (x s(t)) / dx = s (1 + x (1 - s) dt/dx)
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "cpu/vector_math.h"

namespace cca_ds {
namespace {

using at::Tensor;
using Vector = Vectorized<float>;

constexpr float kLinear = 1.5957691216f;   // 2 sqrt(2 / pi)
constexpr float kCubic = 0.0713548162726f;  // 0.044715 of it
constexpr int64_t kGrain = 1 << 15;

struct Sigmoid {
  Vector share;  // s
  Vector rest;   // 1 - s, without cancellation
};

Sigmoid sigmoid(Vector t) {
  const Vector power = exp_of(at::vec::minimum(t.neg(), Vector(80.0f)));  // e^80 is finite, and 1 / (1 + e^80) is 0
  const Vector share = Vector(1.0f) / (power + Vector(1.0f));
  return {share, power * share};
}

// out[k] = f(in)[k] for each element. The last, incomplete step is filled up with zeros.
template <class T, size_t kIn, size_t kOut, class F>
void for_each_element(std::array<const T*, kIn> in, std::array<T*, kOut> out, int64_t count, F f) {
  constexpr int64_t kStep = step_of<T>();
  const auto one_step = [&](const auto& from, const auto& to, int64_t i) {
    std::array<Vector, kIn> a, b;
    for (size_t k = 0; k < kIn; ++k) {
      const Two<float> both = load_two(from[k] + i);
      a[k] = both.a;
      b[k] = both.b;
    }
    const std::array<Vector, kOut> x = f(a), y = f(b);
    for (size_t k = 0; k < kOut; ++k) store_two(to[k] + i, Two<float>{x[k], y[k]});
  };
  at::parallel_for(0, (count + kStep - 1) / kStep, kGrain / kStep, [&](int64_t first, int64_t last) {
    for (int64_t i = first * kStep; i < std::min(last * kStep, count / kStep * kStep); i += kStep) one_step(in, out, i);
    const int64_t done = count / kStep * kStep;
    if (last * kStep <= count) return;
    T padded[kIn + kOut][kStep] = {};
    std::array<const T*, kIn> from;
    std::array<T*, kOut> to;
    for (size_t k = 0; k < kIn; ++k) from[k] = std::copy(in[k] + done, in[k] + count, padded[k]) - (count - done);
    for (size_t k = 0; k < kOut; ++k) to[k] = padded[kIn + k];
    one_step(from, to, 0);
    for (size_t k = 0; k < kOut; ++k) std::copy(to[k], to[k] + (count - done), out[k] + done);
  });
}

Tensor like(const Tensor& x, const Tensor& other) {
  TORCH_CHECK(x.sizes() == other.sizes() && x.scalar_type() == other.scalar_type(), "tensors of shapes ", x.sizes(), " and ",
              other.sizes(), " must be alike");
  return other.contiguous();
}

// out = f of the elements of `in`. All are alike; `out` may be one of them.
template <size_t kIn, class F>
void of_elements(const std::array<Tensor, kIn>& in, Tensor& out, F f) {
  TORCH_CHECK(out.is_contiguous(), "the result's memory must be contiguous");
  with_float_type(out.scalar_type(), [&](auto t) {
    using T = decltype(t);
    std::array<const T*, kIn> from;
    for (size_t k = 0; k < kIn; ++k) from[k] = like(out, in[k]).template const_data_ptr<T>();
    for_each_element<T, kIn, 1>(from, {out.data_ptr<T>()}, out.numel(), [&](const auto& x) {
      return std::array<Vector, 1>{f(x)};
    });
  });
}

Vector exponent_of_gelu(Vector x, Vector square) {
  return x * at::vec::fmadd(Vector(kCubic), square, Vector(kLinear));
}

void gelu(const Tensor& x, Tensor out) {
  of_elements<1>({x.contiguous()}, out, [](const auto& in) {
    return in[0] * sigmoid(exponent_of_gelu(in[0], in[0] * in[0])).share;
  });
}

// In the gradient's place.
void gelu_backward(Tensor grad, const Tensor& x) {
  of_elements<2>({x.contiguous(), grad}, grad, [](const auto& in) {
    const Vector square = in[0] * in[0], slope = at::vec::fmadd(Vector(3 * kCubic), square, Vector(kLinear));
    const Sigmoid s = sigmoid(exponent_of_gelu(in[0], square));
    return in[1] * s.share * at::vec::fmadd(in[0] * s.rest, slope, Vector(1.0f));
  });
}

void swiglu(const Tensor& gate, const Tensor& value, Tensor out) {
  of_elements<2>({gate.contiguous(), value.contiguous()}, out,
                 [](const auto& in) { return in[0] * sigmoid(in[0]).share * in[1]; });
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad, const Tensor& gate, const Tensor& value) {
  const Tensor g = gate.contiguous(), v = like(gate, value), d = like(gate, grad);
  Tensor grad_gate = at::empty_like(g), grad_value = at::empty_like(g);
  with_float_type(gate.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const auto f = [](const auto& in) {
      const Sigmoid s = sigmoid(in[1]);
      const Vector scaled = in[0] * s.share;
      return std::array<Vector, 2>{scaled * in[2] * at::vec::fmadd(in[1], s.rest, Vector(1.0f)), scaled * in[1]};
    };
    for_each_element<T, 3, 2>({d.const_data_ptr<T>(), g.const_data_ptr<T>(), v.const_data_ptr<T>()},
                              {grad_gate.data_ptr<T>(), grad_value.data_ptr<T>()}, gate.numel(), f);
  });
  return {grad_gate, grad_value};
}

TORCH_LIBRARY_IMPL(cca_ds, CPU, m) {
  m.impl("gelu", gelu);
  m.impl("gelu_backward", gelu_backward);
  m.impl("swiglu", swiglu);
  m.impl("swiglu_backward", swiglu_backward);
}

}  // namespace
}  // namespace cca_ds
