// Large fresh memory: where pages are large, few faults stand between a kernel and its results.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace survfuse {

// Asks for huge pages inside [memory, memory + n_bytes); the system may decline.
inline void ask_for_huge_pages(void* memory, int64_t n_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + n_bytes) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)n_bytes;
#endif
}

}  // namespace survfuse
