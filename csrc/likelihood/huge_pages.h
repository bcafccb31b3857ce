// Huge pages for large buffers that are written once, whose page faults cost more than the arithmetic that fills them.
// Measured on an EPYC (Zen 3), one thread, forward and backward of linear_sequence_logp with 1,152 rows, 16,384 codes,
// float32, without madvise / with it: width 256 0.57 to 0.69 s / 0.49 to 0.61 s, 2.5 times as many page faults.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cca_ds {

// Requests huge pages (2 MiB a page fault instead of 4 KiB) for a newly allocated CPU tensor of 8 MiB or more, and returns
// the tensor. It is advice: where the system ignores it nothing changes.
inline at::Tensor on_huge_pages(at::Tensor fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096, kSmallest = uintptr_t(8) << 20;
  if (fresh.is_cpu() && fresh.nbytes() >= kSmallest) {
    const auto begin = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + fresh.nbytes()) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return fresh;
}

}  // namespace cca_ds
