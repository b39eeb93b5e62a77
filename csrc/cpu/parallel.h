// Loops over independent items on several threads.
#pragma once

#include <atomic>
#include <cstdint>

namespace survfuse {

// Calls work(context) on at most n_threads threads at a time, on this one among them, and returns
// when all are done. How often it is called is not said: once at least.
void run_team(void (*work)(void*), void* context, int n_threads);

// Whether those are threads of an OpenMP runtime, or our own.
bool has_team();

// Calls fn(item, thread) for every item in [0, n); threads take the next item as they become free.
// Results may not depend on which thread takes which item.
template <class Fn>
void parallel_for(int64_t n, int n_threads, const Fn& fn) {
  if (n <= 1 || n_threads <= 1) {
    for (int64_t i = 0; i < n; ++i) fn(i, 0);
    return;
  }
  struct Job {
    const Fn& fn;
    int64_t n;
    std::atomic<int64_t> next{0};
    std::atomic<int> threads{0};
  } job{fn, n};
  const auto work = [](void* context) {
    Job& job = *static_cast<Job*>(context);
    const int thread = job.threads.fetch_add(1, std::memory_order_relaxed);
    for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.n;)
      job.fn(i, thread);
  };
  run_team(work, &job, n_threads);
}

}  // namespace survfuse
