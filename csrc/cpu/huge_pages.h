// Large buffers that are written once: their page faults cost more than the arithmetic that fills them.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cca_ds {

// Asks for huge pages under a fresh CPU tensor of more than a few of them: two megabytes a page fault, not four
// kilobytes. Only advice: nothing changes where the system does not follow it.
inline at::Tensor on_huge_pages(at::Tensor fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096, kWorthwhile = uintptr_t(8) << 20;
  if (fresh.is_cpu() && fresh.nbytes() >= kWorthwhile) {
    const auto begin = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + fresh.nbytes()) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return fresh;
}

}  // namespace cca_ds
