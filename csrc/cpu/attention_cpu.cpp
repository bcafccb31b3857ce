// Attention of a training step on a CPU: softmax(q k^T) v where every query sees the first so many keys, as both families'
// do, and its gradients. Compiled once per instruction set; letters as in heads.h.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/heads.h"
#include "cpu/block_matmul.h"

namespace cca_ds {
namespace {

constexpr int64_t kQueries = 64;  // of a block: its scores, and a head's keys and values, stay in the second-level cache
constexpr int64_t kTransposedStride = 96;  // between rows of transposed queries: with 64 they would share cache sets
constexpr int64_t kJump = 32;     // a block ends where the next query sees more than so many keys more

// The depth of a product of so many rows.
template <class T>
int64_t whole_depth(int64_t rows) {
  return kPaired<T> ? rounded_up(rows, 2) : rows;
}

// powers = exp(scores - maximum) of the first `visible`, and 0 for the others up to `end`. Scores have room for, and lose,
// what lies behind the visible ones up to a multiple of 32; float32 powers may take their place.
template <class T>
RowSum<float> row_powers(float* scores, int64_t visible, int64_t end, T* powers) {
  constexpr int64_t kStep = step_of<T>();
  const int64_t whole = rounded_up(visible, kStep);
  std::fill(scores + visible, scores + whole, negative_infinity<float>());
  Vectorized<float> max_a(negative_infinity<float>()), max_b = max_a;
  for (int64_t i = 0; i < whole; i += kStep) {
    const Two<float> x = load_two(scores + i);
    max_a = at::vec::maximum(max_a, x.a);
    max_b = at::vec::maximum(max_b, x.b);
  }
  const float max = largest(at::vec::maximum(max_a, max_b));
  const Vectorized<float> shift(max);
  Vectorized<float> sum_a(0.0f), sum_b(0.0f);
  for (int64_t i = 0; i < whole; i += kStep) {
    const Two<float> x = load_two(scores + i), power{exp_of(x.a - shift), exp_of(x.b - shift)};
    sum_a = sum_a + power.a;
    sum_b = sum_b + power.b;
    store_two(powers + i, power);
  }
  if (whole < end) std::fill(powers + whole, powers + end, T(0.0f));
  return {max, total(sum_a + sum_b)};
}

// Checked once for forward and backward: how many keys each query sees.
const int64_t* limits_of(const Tensor& limits_L, const Shape& shape) {
  TORCH_CHECK(limits_L.scalar_type() == at::kLong && limits_L.is_contiguous() && limits_L.numel() == shape.positions, "limits ",
              limits_L.sizes(), " do not fit ", shape.positions, " positions");
  const int64_t* limits = limits_L.const_data_ptr<int64_t>();
  for (int64_t l = 0; l < shape.positions; ++l) {
    TORCH_CHECK(limits[l] > 0 && limits[l] <= shape.positions && (l == 0 || limits[l] >= limits[l - 1]), "limit ", limits[l],
                " of query ", l, " must be from 1 to ", shape.positions, " and not below the one before");
  }
  return limits;
}

bool has_prefix_attention(bool in_bf16) {
  return in_bf16 ? has_block_matmul<at::BFloat16>() : has_block_matmul<float>();
}

Shape shape_of_attention(const Tensor& heads) {
  const Shape shape = shape_of_heads(heads);
  check_channels(shape);
  const bool in_bf16 = heads.scalar_type() == at::kBFloat16;
  TORCH_CHECK((in_bf16 || heads.scalar_type() == at::kFloat) && has_prefix_attention(in_bf16),
              "prefix_attention takes bf16 and float32, on a processor with a small-block matmul for them, not ",
              heads.scalar_type());
  return shape;
}

// A head's queries `begin` to `begin + rows`, which see no more than `keys` keys.
struct Block {
  int64_t begin, rows, keys;
};

std::vector<Block> blocks_of(const int64_t* limits, int64_t positions) {
  std::vector<Block> blocks;
  for (int64_t begin = 0, end; begin < positions; begin = end) {
    end = begin + 1;
    while (end < std::min(begin + kQueries, positions) && limits[end] - limits[end - 1] <= kJump) ++end;
    blocks.push_back({begin, end - begin, limits[end - 1]});
  }
  return blocks;
}

// prepare(work, head), visit(work, head, block) for its blocks in order, finish(work, head), for each head by its first row.
template <class T, class Work, class Prepare, class Visit, class Finish>
void for_each_block(const Shape& shape, const int64_t* limits, Prepare prepare, Visit visit, Finish finish) {
  const std::vector<Block> blocks = blocks_of(limits, shape.positions);
  at::parallel_for(0, shape.images * shape.heads, 1, [&](int64_t first, int64_t last) {
    Work work(shape);
    for (int64_t n = first; n < last; ++n) {
      const Place head{0, n / shape.heads, n % shape.heads, 0};
      prepare(work, head);
      for (const Block& block : blocks) visit(work, head, block);
      finish(work, head);
    }
    block_matmul_done<T>();
  });
}

template <class T>
struct ForwardWork {
  int64_t width;  // of a row of scores: the keys, rounded up
  std::vector<T> keys, values, powers;
  std::vector<float> scores, mixed;

  explicit ForwardWork(const Shape& s)
      : width(rounded_up(s.positions, 32)), keys(s.channels * width), values(kPaired<T> ? s.channels * width : 0),
        powers(kPaired<T> ? kQueries * width : 0), scores(kQueries * width), mixed(kQueries * s.channels) {}

  T* powers_of(int64_t row) {
    if constexpr (kPaired<T>) return powers.data() + row * width;
    else return scores.data() + row * width;
  }
};

template <class T>
void attend(const Shape& shape, const Tensor& heads, const int64_t* limits, Tensor& mixed_BLHC, Tensor& lse_BHL) {
  using Work = ForwardWork<T>;
  const int64_t positions = shape.positions, channels = shape.channels;
  const T* all = heads.const_data_ptr<T>();
  T* out = mixed_BLHC.data_ptr<T>();
  float* lse = lse_BHL.data_ptr<float>();
  const auto part = [&](int64_t number, const Place& head) {
    return all + shape.among_heads({number, head.image, head.head, 0});
  };
  const auto prepare = [&](Work& work, const Place& head) {
    transpose_second(part(1, head), channels, channels, work.keys.data(), work.width, positions);
    second_of(part(2, head), channels, positions, channels, work.values.data(), channels);
  };
  const auto mix = [&](Work& work, const Place& head, const Block& block) {
    const int64_t depth = whole_depth<T>(block.keys);
    block_matmul(block.rows, block.keys, channels, part(0, head) + block.begin * channels, channels, work.keys.data(),
                 work.width, work.scores.data(), work.width);
    RowSum<float> sums[kQueries];
    for (int64_t r = 0; r < block.rows; ++r) {
      sums[r] = row_powers(work.scores.data() + r * work.width, limits[block.begin + r], depth, work.powers_of(r));
    }
    const T* values = kPaired<T> ? work.values.data() : part(2, head);
    block_matmul(block.rows, channels, depth, work.powers_of(0), work.width, values, channels, work.mixed.data(), channels);
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t position = block.begin + r;
      float* row = work.mixed.data() + r * channels;
      const float scale = 1.0f / sums[r].sum;
      for (int64_t c = 0; c < channels; ++c) row[c] *= scale;
      row_from_fp32(row, channels, out + ((head.image * positions + position) * shape.heads + head.head) * channels);
      lse[shape.row({0, head.image, head.head, position})] = sums[r].max + std::log(sums[r].sum);
    }
  };
  for_each_block<T, Work>(shape, limits, prepare, mix, [](Work&, const Place&) {});
}

// Softmax of q k^T over the first limits[l] keys of query l, times v: [B, L, H, C], and the log-sum-exps [B, H, L] float32.
std::tuple<Tensor, Tensor> prefix_attention(const Tensor& heads_3BHLC, const Tensor& limits_L) {
  const Shape shape = shape_of_attention(heads_3BHLC);
  const Tensor heads = heads_3BHLC.contiguous();
  Tensor mixed_BLHC = at::empty({shape.images, shape.positions, shape.heads, shape.channels}, heads.options());
  Tensor lse_BHL = at::empty({shape.images, shape.heads, shape.positions}, heads.options().dtype(at::kFloat));
  const int64_t* limits = limits_of(limits_L, shape);
  with_float_type(heads.scalar_type(), [&](auto t) { attend<decltype(t)>(shape, heads, limits, mixed_BLHC, lse_BHL); });
  return {mixed_BLHC, lse_BHL};
}

template <class T>
struct BackwardWork {
  int64_t width;
  std::vector<T> keys_transposed, values_transposed, keys, grads, transposed, powers, slopes, packed;
  std::vector<float> scores, grad_powers, grad_queries, grad_keys, grad_values, sums;

  explicit BackwardWork(const Shape& s)
      : width(rounded_up(s.positions, 32)), keys_transposed(s.channels * width), values_transposed(s.channels * width),
        keys(kPaired<T> ? s.channels * width : 0), grads(kQueries * s.channels), transposed(s.channels * kTransposedStride),
        powers(kPaired<T> ? kQueries * width : 0), slopes(powers.size()), packed(powers.size()), scores(kQueries * width),
        grad_powers(kQueries * width), grad_queries(kQueries * s.channels), grad_keys(s.channels * width),
        grad_values(s.channels * width), sums(kPaired<T> ? s.channels * width : 0) {}

  // In float32 the powers overwrite the scores, and the slopes overwrite grad_powers.
  T* powers_of(int64_t row) {
    if constexpr (kPaired<T>) return powers.data() + row * width;
    else return scores.data() + row * width;
  }
  T* slopes_of(int64_t row) {
    if constexpr (kPaired<T>) return slopes.data() + row * width;
    else return grad_powers.data() + row * width;
  }
};

// powers P = exp(scores - lse) and slopes dS = P (dP - delta) of the first `visible`; 0 up to `end`. All four have
// room up to a multiple of 32 behind the visible ones, and the two of float32 lose what lies there.
template <class T>
void row_slopes(float* scores, float* grad_powers, int64_t visible, int64_t end, float lse, float delta, T* powers, T* slopes) {
  constexpr int64_t kStep = step_of<T>();
  const int64_t whole = rounded_up(visible, kStep);
  std::fill(scores + visible, scores + whole, negative_infinity<float>());
  std::fill(grad_powers + visible, grad_powers + whole, 0.0f);
  const Vectorized<float> shift(lse), below(delta);
  for (int64_t i = 0; i < whole; i += kStep) {
    const Two<float> x = load_two(scores + i), y = load_two(grad_powers + i);
    const Two<float> power{exp_of(x.a - shift), exp_of(x.b - shift)};
    store_two(powers + i, power);
    store_two(slopes + i, Two<float>{power.a * (y.a - below), power.b * (y.b - below)});
  }
  if (whole >= end) return;
  std::fill(powers + whole, powers + end, T(0.0f));
  std::fill(slopes + whole, slopes + end, T(0.0f));
}

template <class T>
void attend_backward(const Shape& shape, const Tensor& grad, const Tensor& heads, const Tensor& mixed, const Tensor& lse_BHL,
                     const int64_t* limits, Tensor& grads_3BHLC) {
  using Work = BackwardWork<T>;
  const int64_t positions = shape.positions, channels = shape.channels, stride = shape.heads * channels;
  const T *all = heads.const_data_ptr<T>(), *mixed_in = mixed.const_data_ptr<T>(), *grad_in = grad.const_data_ptr<T>();
  const float* lse = lse_BHL.const_data_ptr<float>();
  T* out = grads_3BHLC.data_ptr<T>();
  const auto offset = [&](int64_t number, const Place& head) {
    return shape.among_heads({number, head.image, head.head, 0});
  };
  const auto prepare = [&](Work& work, const Place& head) {
    transpose_second(all + offset(1, head), channels, channels, work.keys_transposed.data(), work.width, positions);
    transpose_second(all + offset(2, head), channels, channels, work.values_transposed.data(), work.width, positions);
    second_of(all + offset(1, head), channels, positions, channels, work.keys.data(), channels);
    std::fill(work.grad_keys.begin(), work.grad_keys.end(), 0.0f);
    std::fill(work.grad_values.begin(), work.grad_values.end(), 0.0f);
  };
  const auto differentiate = [&](Work& work, const Place& head, const Block& block) {
    T* own_grads = work.grads.data();  // of the block's rows, one after another
    float deltas[kQueries];
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t at = (head.image * positions + block.begin + r) * stride + head.head * channels;
      float grad_row[kMostChannels], mixed_row[kMostChannels];
      row_to_fp32(grad_in + at, channels, grad_row);
      row_to_fp32(mixed_in + at, channels, mixed_row);
      deltas[r] = dot(grad_row, mixed_row, channels);
      std::copy(grad_in + at, grad_in + at + channels, own_grads + r * channels);
    }
    const T* own_queries = all + offset(0, head) + block.begin * channels;
    block_matmul(block.rows, block.keys, channels, own_queries, channels, work.keys_transposed.data(), work.width,
                 work.scores.data(), work.width);
    block_matmul(block.rows, block.keys, channels, own_grads, channels, work.values_transposed.data(), work.width,
                 work.grad_powers.data(), work.width);
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t row = r * work.width, position = block.begin + r;
      row_slopes(work.scores.data() + row, work.grad_powers.data() + row, limits[position], whole_depth<T>(block.keys),
                 lse[shape.row({0, head.image, head.head, position})], deltas[r], work.powers_of(r), work.slopes_of(r));
    }
    const T* keys = kPaired<T> ? work.keys.data() : all + offset(1, head);
    block_matmul(block.rows, channels, whole_depth<T>(block.keys), work.slopes_of(0), work.width, keys, channels,
                 work.grad_queries.data(), channels);
    row_from_fp32(work.grad_queries.data(), block.rows * channels, out + offset(0, head) + block.begin * channels);
    // keys and values gather q^T dS and g^T P over the blocks, both [C, keys]
    const auto gather = [&](const T* rows, const T* of_rows, std::vector<float>& sums) {
      const int64_t depth = whole_depth<T>(block.rows);
      transpose<T, 64 / sizeof(T)>(rows, channels, work.transposed.data(), kTransposedStride, block.rows, channels);
      for (int64_t c = 0; depth > block.rows && c < channels; ++c) {
        work.transposed[c * kTransposedStride + block.rows] = T(0.0f);
      }
      const auto second = second_of(of_rows, work.width, block.rows, block.keys, work.packed.data(), work.width);
      block_matmul(channels, block.keys, depth, work.transposed.data(), kTransposedStride, second.data, second.stride,
                   sums.data(), work.width, /*add=*/true);
    };
    gather(own_grads, work.powers_of(0), work.grad_values);
    gather(own_queries, work.slopes_of(0), work.grad_keys);
  };
  const auto finish = [&](Work& work, const Place& head) {
    for (const int64_t number : {1, 2}) {
      const std::vector<float>& sums = number == 1 ? work.grad_keys : work.grad_values;
      T* to = out + offset(number, head);
      if constexpr (kPaired<T>) {
        transpose<float, 16>(sums.data(), work.width, work.sums.data(), channels, channels, positions);
        row_from_fp32(work.sums.data(), positions * channels, to);
      } else {
        transpose<float, 16>(sums.data(), work.width, to, channels, channels, positions);
      }
    }
  };
  for_each_block<T, Work>(shape, limits, prepare, differentiate, finish);
}

// Gradients [3, B, H, L, C] of the heads into `out`, from that of the mixed values [B, L, H, C].
void prefix_attention_backward(const Tensor& grad_BLHC, const Tensor& heads_3BHLC, const Tensor& mixed_BLHC,
                               const Tensor& lse_BHL, const Tensor& limits_L, Tensor out) {
  const Shape shape = shape_of_attention(heads_3BHLC);
  TORCH_CHECK(grad_BLHC.sizes() == mixed_BLHC.sizes() && mixed_BLHC.numel() == shape.rows() * shape.channels &&
                  lse_BHL.numel() == shape.rows() && grad_BLHC.scalar_type() == heads_3BHLC.scalar_type() &&
                  out.is_contiguous() && out.sizes() == heads_3BHLC.sizes() && out.scalar_type() == heads_3BHLC.scalar_type(),
              "a gradient ", grad_BLHC.sizes(), " and one of ", out.sizes(), " do not fit heads ", heads_3BHLC.sizes());
  const Tensor heads = heads_3BHLC.contiguous(), grad = grad_BLHC.contiguous(), mixed = mixed_BLHC.contiguous();
  const int64_t* limits = limits_of(limits_L, shape);
  with_float_type(heads.scalar_type(), [&](auto t) {
    attend_backward<decltype(t)>(shape, grad, heads, mixed, lse_BHL, limits, out);
  });
}

TORCH_LIBRARY_IMPL(cca_ds, CPU, m) {
  m.impl("prefix_attention", prefix_attention);
  m.impl("prefix_attention_backward", prefix_attention_backward);
}

// Takes no tensor, so no device: there is one CPU.
TORCH_LIBRARY_IMPL(cca_ds, CompositeExplicitAutograd, m) {
  m.impl("has_prefix_attention", has_prefix_attention);
}

}  // namespace
}  // namespace cca_ds
