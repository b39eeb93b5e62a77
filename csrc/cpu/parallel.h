// Threads of our own: no second OpenMP runtime in the process, nothing that a fork could break.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace survfuse {

// Calls fn(item, thread) for every item in [0, n); threads take the next item as they become free.
// Results may not depend on which thread takes which item.
template <class Fn>
void parallel_for(int64_t n, int n_threads, const Fn& fn) {
  if (n_threads > n) n_threads = static_cast<int>(n);
  if (n_threads <= 1) {
    for (int64_t i = 0; i < n; ++i) fn(i, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  const auto work = [&](int thread) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) fn(i, thread);
  };
  // started per call: about 15 us each, and neither a fork nor an exit can find one running
  std::vector<std::thread> threads;
  threads.reserve(n_threads - 1);
  try {
    for (int t = 1; t < n_threads; ++t) threads.emplace_back(work, t);
  } catch (...) {
    // no more threads to be had: the ones that started and this one do the work
  }
  work(0);
  for (auto& thread : threads) thread.join();
}

}  // namespace survfuse
