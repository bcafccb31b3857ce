// Reads cases from stdin and runs the project's launchers on them, as raw numbers of the machine:
//   int64: launcher (0 stats, 1 gradient, 2 residual) element other rows vocabulary rows_per_sequence has_bias in_place
//          shift_in shift_out most_blocks seed, then logits, bias if any, targets, and for a gradient stats [N, 2] and
//          grad [rows / rows_per_sequence]
// Shifts are elements by which a buffer begins beside a boundary of 16 bytes. Every buffer is of its exact size, for the
// address sanitizer. Writes what the launcher wrote.
#include <algorithm>
#include <cstring>
#include <memory>

#include "kernels.cpp"

using namespace cca_ds;

static size_t size_of(Element element) { return element == Element::kFloat32 ? 4 : 2; }

static bool read(void* to, size_t bytes) { return bytes == 0 || std::fread(to, bytes, 1, stdin) == 1; }

// A buffer of `bytes` that begins `shift` bytes behind a boundary of 16 and ends where the allocation ends.
struct Buffer {
  std::unique_ptr<char[]> memory;
  char* data;
  Buffer(size_t bytes, size_t shift) : memory(new char[bytes + shift]), data(memory.get() + shift) {}
};

int main() {
  int64_t head[12];
  while (read(head, sizeof head)) {
    const auto [launcher, element, other, rows, vocabulary, per_sequence, has_bias, in_place, shift_in, shift_out, blocks,
                seed] = head;
    const Element logits_type = Element(element), other_type = Element(other);
    const size_t out_size = size_of(launcher == 1 ? logits_type : other_type);
    Buffer logits(rows * vocabulary * size_of(logits_type), shift_in * size_of(logits_type));
    Buffer bias(has_bias * vocabulary * size_of(other_type), 0), targets(rows * 8, 0), stats(rows * 8, 0);
    Buffer grad(launcher == 1 ? rows / per_sequence * 4 : 0, 0), logp(rows * 4, 0);
    Buffer separate(rows * vocabulary * out_size, shift_out * out_size);
    if (!read(logits.data, rows * vocabulary * size_of(logits_type)) ||
        !read(bias.data, has_bias * vocabulary * size_of(other_type)) || !read(targets.data, rows * 8)) {
      return 1;
    }
    if (launcher == 1 && (!read(stats.data, rows * 8) || !read(grad.data, rows / per_sequence * 4))) return 1;
    emulation::most_blocks = static_cast<unsigned>(blocks);
    emulation::order.seed(static_cast<unsigned>(seed));
    const Rows given{logits_type, other_type, logits.data, has_bias ? bias.data : nullptr,
                     reinterpret_cast<const int64_t*>(targets.data), rows, static_cast<int>(vocabulary)};
    float* log_p = reinterpret_cast<float*>(logp.data);
    float* of_rows = reinterpret_cast<float*>(stats.data);
    char* out = in_place ? logits.data : separate.data;
    cudaError_t error = cudaErrorInvalidValue;
    if (launcher == 0) error = launch_row_stats(given, log_p, of_rows, nullptr);
    if (launcher == 1) {
      error = launch_row_gradient(given, of_rows, reinterpret_cast<float*>(grad.data), per_sequence, out, nullptr);
    }
    if (launcher == 2) error = launch_row_residual(given, log_p, out, nullptr);
    if (error != cudaSuccess) return 3;
    if (launcher != 1) std::fwrite(log_p, 4, rows, stdout);
    if (launcher == 0) std::fwrite(of_rows, 8, rows, stdout);
    if (launcher != 0) std::fwrite(out, out_size, rows * vocabulary, stdout);
  }
  return 0;
}
