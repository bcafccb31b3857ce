// Runs the row algorithm of csrc/sequence_logp.h as the CUDA kernels do, thread by thread and lane by lane, on the CPU.
// Reads from stdin:  V threads target weight misalign_row misalign_out narrow bias_given, V logits, V biases if given.
// Writes: log p, the row's maximum, the log of its sum, then V gradients, and how often each element was visited.
#include <cstdio>
#include <cstring>
#include <vector>

#include "likelihood/sequence_logp.h"

// A 16-bit float in software, so that the packs of 8 and the mixed widths are tried too.
struct Bf16 {
  uint16_t bits;
  Bf16() = default;
  explicit Bf16(float x) {
    uint32_t word;
    std::memcpy(&word, &x, 4);
    bits = x != x ? 0x7fc0 : uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t word = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &word, 4);
    return x;
  }
};

using namespace cca_ds;

// As reduce_block in sequence_logp_cuda.cu: 32 lanes by halving, then the warps' sums by 32 lanes of the first warp.
static RowSum<float> reduce_warp(std::vector<RowSum<float>> lanes) {
  for (int distance = 16; distance > 0; distance /= 2) {
    for (int lane = 0; lane + distance < 32; ++lane) lanes[lane] = merge(lanes[lane], lanes[lane + distance]);
  }
  return lanes[0];
}

static RowSum<float> reduce_block(const std::vector<RowSum<float>>& threads) {
  std::vector<RowSum<float>> warps(32, empty_row<float>());
  for (size_t warp = 0; warp < threads.size() / 32; ++warp) {
    warps[warp] = reduce_warp({threads.begin() + warp * 32, threads.begin() + warp * 32 + 32});
  }
  return reduce_warp(warps);
}

template <class T, class O>
int run(int64_t vocabulary, int threads, int64_t target, float weight, int shift_row, int shift_out, bool has_bias) {
  std::vector<char> row_bytes((vocabulary + 32) * sizeof(T) + 16), out_bytes((vocabulary + 32) * sizeof(O) + 16);
  const auto aligned = [](std::vector<char>& bytes) {
    return bytes.data() + (16 - reinterpret_cast<uintptr_t>(bytes.data()) % 16) % 16;
  };
  T* row = reinterpret_cast<T*>(aligned(row_bytes)) + shift_row;
  O* out = reinterpret_cast<O*>(aligned(out_bytes)) + shift_out;
  std::vector<O> bias(vocabulary);
  float x;
  for (int64_t i = 0; i < vocabulary; ++i) {
    if (std::scanf("%f", &x) != 1) return 1;
    row[i] = T(x);
  }
  for (int64_t i = 0; has_bias && i < vocabulary; ++i) {
    if (std::scanf("%f", &x) != 1) return 1;
    bias[i] = O(x);
  }
  const O* bias_or_null = has_bias ? bias.data() : nullptr;
  std::vector<RowSum<float>> sums(threads);
  for (int t = 0; t < threads; ++t) sums[t] = thread_row_sum(row, bias_or_null, vocabulary, t, threads);
  const RowStats<float> stats = finish(reduce_block(sums));
  const bool known = in_vocabulary(target, vocabulary);
  const float logp = known ? token_logp(logit_at(row, bias_or_null, target), stats) : not_a_number<float>();
  for (int t = 0; t < threads; ++t) {
    thread_row_gradient(row, bias_or_null, out, vocabulary, target, stats, weight, t, threads);
  }
  std::vector<int> visits(vocabulary);
  constexpr int kWidth = pack_width<T, O>();
  for (int t = 0; t < threads; ++t) {
    const auto packs = [&](int64_t i, int64_t stride, auto count) {
      for (int j = 0; j < decltype(count)::value; ++j) {
        for (int k = 0; k < kWidth; ++k) ++visits.at(i + j * stride + k);
      }
    };
    visit_share<kWidth>(split_row(row, out, vocabulary), vocabulary, t, threads, packs, [&](int64_t i) { ++visits.at(i); });
  }
  std::printf("%.9g %.9g %.9g\n", logp, stats.max, stats.log_sum);
  for (int64_t i = 0; i < vocabulary; ++i) std::printf("%.9g ", float(out[i]));
  std::printf("\n");
  for (const int v : visits) std::printf("%d ", v);
  std::printf("\n%lld\n", static_cast<long long>(row_offset(int64_t(1) << 20, int64_t(1) << 14)));
  return 0;
}

int main() {
  long long vocabulary, target;
  int threads, shift_row, shift_out, narrow, has_bias;
  float weight;
  if (std::scanf("%lld %d %lld %f %d %d %d %d", &vocabulary, &threads, &target, &weight, &shift_row, &shift_out, &narrow,
                 &has_bias) != 8) {
    return 1;
  }
  switch (narrow) {
    case 0:
      return run<float, float>(vocabulary, threads, target, weight, shift_row, shift_out, has_bias);
    case 1:
      return run<float, Bf16>(vocabulary, threads, target, weight, shift_row, shift_out, has_bias);
    default:
      return run<Bf16, Bf16>(vocabulary, threads, target, weight, shift_row, shift_out, has_bias);
  }
}
