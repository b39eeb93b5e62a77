// Whose threads do the work: those of the OpenMP runtime that torch brought, if there is one.
#include "cpu/parallel.h"

#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace survfuse {
namespace {

// How libgomp, and libiomp for its sake, starts a team: `threads` times work(context).
using Team = void (*)(void (*work)(void*), void* context, unsigned threads, unsigned flags);

// Behind a parallel operation of torch its threads wait for the next one without sleeping, for
// milliseconds. Threads of our own would share the cores with them, and two would be no faster
// than one; so we ask for theirs, by name: nothing is linked, and no second runtime enters the
// process.
#if defined(__unix__) || defined(__APPLE__)
Team find_team() { return reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel")); }

const pid_t kProcess = getpid();  // that this library was loaded in

Team team() {
  // looked up until it is there: torch may be imported later
  static std::atomic<Team> found{nullptr};
  // a forked child has the runtime's memory without its threads, and would wait for them forever
  if (getpid() != kProcess) return nullptr;
  Team now = found.load(std::memory_order_relaxed);
  if (!now) found.store(now = find_team(), std::memory_order_relaxed);
  return now;
}
#else
Team team() { return nullptr; }
#endif

// started per call: about 15 us each, and neither a fork nor an exit can find one running
void run_own(void (*work)(void*), void* context, int n_threads) {
  std::vector<std::thread> threads;
  threads.reserve(n_threads - 1);
  try {
    for (int t = 1; t < n_threads; ++t) threads.emplace_back(work, context);
  } catch (...) {
    // no more threads to be had: the ones that started and this one do the work
  }
  work(context);
  for (auto& thread : threads) thread.join();
}

}  // namespace

bool has_team() { return team() != nullptr; }

void run_team(void (*work)(void*), void* context, int n_threads) {
  if (const Team start = team())
    start(work, context, static_cast<unsigned>(n_threads), 0);
  else
    run_own(work, context, n_threads);
}

}  // namespace survfuse
