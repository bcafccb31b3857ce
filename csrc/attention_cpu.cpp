// Attention of a training step on a CPU in bf16: softmax(q k^T) v where every query sees the first so many keys, as both
// families' do, and its gradients. Compiled once per instruction set; letters as in heads.h.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "heads.h"
#include "wide_product.h"

namespace cca_ds {
namespace {

using at::BFloat16;

constexpr int64_t kQueries = 64;  // of a block: its scores, and a head's keys and values, stay in the second-level cache
constexpr int64_t kTurned = 96;   // between rows of turned scores: 64 would put them in the same few lines of the caches

int64_t rounded_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// Rows [L, C] as pairs of positions side by side, [L / 2, C, 2]; the partner of an odd last one is 0.
void pack_rows(const BFloat16* from, int64_t positions, int64_t channels, BFloat16* to) {
  for (int64_t l = 0; l < positions; l += 2) {
    const BFloat16 *even = from + l * channels, *odd = even + channels;
    BFloat16* pair = to + l * channels;
    for (int64_t c = 0; c < channels; ++c) pair[2 * c] = even[c];
    if (l + 1 < positions) {
      for (int64_t c = 0; c < channels; ++c) pair[2 * c + 1] = odd[c];
    } else {
      for (int64_t c = 0; c < channels; ++c) pair[2 * c + 1] = BFloat16(0.0f);
    }
  }
}

// powers = exp(scores - maximum) of the first `visible` in bf16, and 0 for the others up to `end`. Scores have room for,
// and lose, what lies behind the visible ones up to a multiple of 32.
RowSum<float> row_powers(float* scores, int64_t visible, int64_t end, BFloat16* powers) {
  constexpr int64_t kStep = step_of<BFloat16>();
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
  if (whole < end) std::fill(powers + whole, powers + end, BFloat16(0.0f));
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

Shape shape_of_attention(const Tensor& heads) {
  const Shape shape = shape_of_heads(heads);
  check_channels(shape);
  TORCH_CHECK(has_wide_product() && heads.scalar_type() == at::kBFloat16, "prefix_attention takes bf16, on a processor with ",
              "its products");
  return shape;
}

// A head's queries `begin` to `begin + rows`, which see no more than `keys` keys.
struct Block {
  int64_t begin, rows, keys;
};

// prepare(work, head), visit(work, head, block) for its blocks in order, finish(work, head), for each head by its first row.
template <class Work, class Prepare, class Visit, class Finish>
void for_each_block(const Shape& shape, const int64_t* limits, Prepare prepare, Visit visit, Finish finish) {
  at::parallel_for(0, shape.images * shape.heads, 1, [&](int64_t first, int64_t last) {
    Work work(shape);
    for (int64_t n = first; n < last; ++n) {
      const Place head{0, n / shape.heads, n % shape.heads, 0};
      prepare(work, head);
      for (int64_t begin = 0; begin < shape.positions; begin += kQueries) {
        const int64_t rows = std::min(kQueries, shape.positions - begin);
        visit(work, head, Block{begin, rows, limits[begin + rows - 1]});
      }
      finish(work, head);
    }
    wide_product_done();
  });
}

struct ForwardWork {
  int64_t width;  // of a row of scores: the keys, rounded up
  std::vector<BFloat16> keys, values, powers;
  std::vector<float> scores, mixed;

  explicit ForwardWork(const Shape& s)
      : width(rounded_up(s.positions, 32)), keys(s.channels * width), values(s.channels * width), powers(kQueries * width),
        scores(kQueries * width), mixed(kQueries * s.channels) {}
};

// Softmax of q k^T over the first limits[l] keys of query l, times v: [B, L, H, C], and the log-sum-exps [B, H, L] float32.
std::tuple<Tensor, Tensor> prefix_attention(const Tensor& heads_3BHLC, const Tensor& limits_L) {
  const Shape shape = shape_of_attention(heads_3BHLC);
  const Tensor heads = heads_3BHLC.contiguous();
  const int64_t* limits = limits_of(limits_L, shape);
  const int64_t positions = shape.positions, channels = shape.channels;
  Tensor mixed_BLHC = at::empty({shape.images, positions, shape.heads, channels}, heads.options());
  Tensor lse_BHL = at::empty({shape.images, shape.heads, positions}, heads.options().dtype(at::kFloat));
  const BFloat16* all = heads.const_data_ptr<BFloat16>();
  BFloat16* out = mixed_BLHC.data_ptr<BFloat16>();
  float* lse = lse_BHL.data_ptr<float>();
  const auto part = [&](int64_t number, const Place& head) {
    return all + shape.among_heads({number, head.image, head.head, 0});
  };
  const auto prepare = [&](ForwardWork& work, const Place& head) {
    pack_transposed(part(1, head), channels / 2, work.keys.data(), work.width, positions);
    pack_rows(part(2, head), positions, channels, work.values.data());
  };
  const auto mix = [&](ForwardWork& work, const Place& head, const Block& block) {
    const int64_t even_keys = rounded_up(block.keys, 2);
    wide_product(block.rows, block.keys, channels, part(0, head) + block.begin * channels, channels, work.keys.data(),
                 work.width, work.scores.data(), work.width);
    RowSum<float> sums[kQueries];
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t offset = r * work.width;
      sums[r] = row_powers(work.scores.data() + offset, limits[block.begin + r], even_keys, work.powers.data() + offset);
    }
    wide_product(block.rows, channels, even_keys, work.powers.data(), work.width, work.values.data(), channels,
                 work.mixed.data(), channels);
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t position = block.begin + r;
      float* row = work.mixed.data() + r * channels;
      const float scale = 1.0f / sums[r].sum;
      for (int64_t c = 0; c < channels; ++c) row[c] *= scale;
      narrow_row(row, channels, out + ((head.image * positions + position) * shape.heads + head.head) * channels);
      lse[shape.row({0, head.image, head.head, position})] = sums[r].max + std::log(sums[r].sum);
    }
  };
  for_each_block<ForwardWork>(shape, limits, prepare, mix, [](ForwardWork&, const Place&) {});
  return {mixed_BLHC, lse_BHL};
}

struct BackwardWork {
  int64_t width;
  std::vector<BFloat16> keys_turned, values_turned, keys, queries, grads, powers, slopes, turned;
  std::vector<float> scores, products, grad_queries, grad_keys, grad_values;

  explicit BackwardWork(const Shape& s)
      : width(rounded_up(s.positions, 32)), keys_turned(s.channels * width), values_turned(s.channels * width),
        keys(s.channels * width), queries(s.channels * kQueries), grads(s.channels * kQueries), powers(kQueries * width),
        slopes(kQueries * width), turned(kTurned * width), scores(kQueries * width), products(kQueries * width),
        grad_queries(kQueries * s.channels), grad_keys(s.channels * width), grad_values(s.channels * width) {}
};

// powers P = exp(scores - lse) and slopes dS = P (products - delta), in bf16, of the first `visible`; 0 up to `end`. All
// four have room up to a multiple of 32 behind the visible ones, and the two of float32 lose what lies there.
void row_slopes(float* scores, float* products, int64_t visible, int64_t end, float lse, float delta, BFloat16* powers,
                BFloat16* slopes) {
  constexpr int64_t kStep = step_of<BFloat16>();
  const int64_t whole = rounded_up(visible, kStep);
  std::fill(scores + visible, scores + whole, negative_infinity<float>());
  std::fill(products + visible, products + whole, 0.0f);
  const Vectorized<float> shift(lse), below(delta);
  for (int64_t i = 0; i < whole; i += kStep) {
    const Two<float> x = load_two(scores + i), y = load_two(products + i);
    const Two<float> power{exp_of(x.a - shift), exp_of(x.b - shift)};
    store_two(powers + i, power);
    store_two(slopes + i, Two<float>{power.a * (y.a - below), power.b * (y.b - below)});
  }
  if (whole >= end) return;
  std::fill(powers + whole, powers + end, BFloat16(0.0f));
  std::fill(slopes + whole, slopes + end, BFloat16(0.0f));
}

// Gradients [3, B, H, L, C] of the heads, from that of the mixed values [B, L, H, C].
Tensor prefix_attention_backward(const Tensor& grad_BLHC, const Tensor& heads_3BHLC, const Tensor& mixed_BLHC,
                                 const Tensor& lse_BHL, const Tensor& limits_L) {
  const Shape shape = shape_of_attention(heads_3BHLC);
  const int64_t positions = shape.positions, channels = shape.channels, stride = shape.heads * channels;
  TORCH_CHECK(grad_BLHC.sizes() == mixed_BLHC.sizes() && mixed_BLHC.numel() == shape.rows() * channels &&
                  lse_BHL.numel() == shape.rows() && grad_BLHC.scalar_type() == at::kBFloat16,
              "a gradient ", grad_BLHC.sizes(), " does not fit heads ", heads_3BHLC.sizes());
  const Tensor heads = heads_3BHLC.contiguous(), grad = grad_BLHC.contiguous(), mixed = mixed_BLHC.contiguous();
  const int64_t* limits = limits_of(limits_L, shape);
  const BFloat16 *all = heads.const_data_ptr<BFloat16>(), *mixed_in = mixed.const_data_ptr<BFloat16>();
  const BFloat16* grad_in = grad.const_data_ptr<BFloat16>();
  const float* lse = lse_BHL.const_data_ptr<float>();
  Tensor grads_3BHLC = at::empty_like(heads);
  BFloat16* out = grads_3BHLC.data_ptr<BFloat16>();
  const auto offset = [&](int64_t number, const Place& head) {
    return shape.among_heads({number, head.image, head.head, 0});
  };
  const auto prepare = [&](BackwardWork& work, const Place& head) {
    pack_transposed(all + offset(1, head), channels / 2, work.keys_turned.data(), work.width, positions);
    pack_transposed(all + offset(2, head), channels / 2, work.values_turned.data(), work.width, positions);
    pack_rows(all + offset(1, head), positions, channels, work.keys.data());
    std::fill(work.grad_keys.begin(), work.grad_keys.end(), 0.0f);
    std::fill(work.grad_values.begin(), work.grad_values.end(), 0.0f);
  };
  const auto differentiate = [&](BackwardWork& work, const Place& head, const Block& block) {
    const int64_t even_keys = rounded_up(block.keys, 2), even_rows = rounded_up(block.rows, 2);
    BFloat16 own_grads[kQueries * kMostChannels];  // of the block's rows, one after another
    float deltas[kQueries];
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t at = (head.image * positions + block.begin + r) * stride + head.head * channels;
      float wide_grad[kMostChannels], wide_mixed[kMostChannels];
      widen_row(grad_in + at, channels, wide_grad);
      widen_row(mixed_in + at, channels, wide_mixed);
      deltas[r] = dot(wide_grad, wide_mixed, channels);
      std::copy(grad_in + at, grad_in + at + channels, own_grads + r * channels);
    }
    const BFloat16* own_queries = all + offset(0, head) + block.begin * channels;
    wide_product(block.rows, block.keys, channels, own_queries, channels, work.keys_turned.data(), work.width,
                 work.scores.data(), work.width);
    wide_product(block.rows, block.keys, channels, own_grads, channels, work.values_turned.data(), work.width,
                 work.products.data(), work.width);
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t row = r * work.width, position = block.begin + r;
      row_slopes(work.scores.data() + row, work.products.data() + row, limits[position], even_keys,
                 lse[shape.row({0, head.image, head.head, position})], deltas[r], work.powers.data() + row,
                 work.slopes.data() + row);
    }
    wide_product(block.rows, channels, even_keys, work.slopes.data(), work.width, work.keys.data(), channels,
                 work.grad_queries.data(), channels);
    for (int64_t r = 0; r < block.rows; ++r) {
      narrow_row(work.grad_queries.data() + r * channels, channels, out + offset(0, head) + (block.begin + r) * channels);
    }
    // keys and values gather P^T g and dS^T q over the blocks
    const auto gather = [&](const std::vector<BFloat16>& of_rows, const BFloat16* rows, std::vector<BFloat16>& packed,
                            std::vector<float>& sums) {
      pack_rows(rows, block.rows, channels, packed.data());
      transpose<BFloat16, 32>(of_rows.data(), work.width, work.turned.data(), kTurned, block.rows, block.keys);
      if (even_rows > block.rows) {
        for (int64_t key = 0; key < block.keys; ++key) work.turned[key * kTurned + block.rows] = BFloat16(0.0f);
      }
      wide_product(block.keys, channels, even_rows, work.turned.data(), kTurned, packed.data(), channels, sums.data(), channels,
                   /*add=*/true);
    };
    gather(work.powers, own_grads, work.grads, work.grad_values);
    gather(work.slopes, own_queries, work.queries, work.grad_keys);
  };
  const auto finish = [&](BackwardWork& work, const Place& head) {
    narrow_row(work.grad_keys.data(), positions * channels, out + offset(1, head));
    narrow_row(work.grad_values.data(), positions * channels, out + offset(2, head));
  };
  for_each_block<BackwardWork>(shape, limits, prepare, differentiate, finish);
  return grads_3BHLC;
}

TORCH_LIBRARY_IMPL(cca_ds, CPU, m) {
  m.impl("prefix_attention", prefix_attention);
  m.impl("prefix_attention_backward", prefix_attention_backward);
}

// Takes no tensor, so no device: there is one CPU.
TORCH_LIBRARY_IMPL(cca_ds, CompositeExplicitAutograd, m) {
  m.impl("has_prefix_attention", has_wide_product);
}

}  // namespace
}  // namespace cca_ds
