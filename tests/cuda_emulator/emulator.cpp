#include "emulator.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

// bounds of the static shared memory of all kernels, set by the linker; absent where none has any
extern "C" __attribute__((weak)) char __start_emulated_shared[], __stop_emulated_shared[];

#if defined(__x86_64__)
#define TRAP_SIGNAL SIGILL
#else
#define TRAP_SIGNAL SIGTRAP
#endif

namespace emulator {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kMaxShared = 227 << 10;
constexpr unsigned kMaxThreads = 1024;

enum class State { kReady, kAtBlock, kAtWarp, kDone };

struct Fiber {
  State state;
  ucontext_t start;
  jmp_buf at;
  bool started;
  // what it waits with
  Kind kind;
  unsigned mask;
  uint32_t bits;
  int source;
};

// One launch at a time: this is no place for threads.
struct Machine {
  std::vector<Fiber> fibers;
  std::vector<char> stacks;
  jmp_buf home;
  const std::function<void()>* body = nullptr;
  unsigned grid = 0, block = 0, current = 0, current_block = 0, most_blocks = 0;
  char* shared = nullptr;
  uint64_t seed = 0;
  std::string error, last_error;
} machine;

uint64_t random_bits() {
  machine.seed = machine.seed * 6364136223846793005u + 1442695040888963407u;
  return machine.seed >> 33;
}

std::vector<unsigned> order(unsigned n) {
  std::vector<unsigned> indices(n);
  std::iota(indices.begin(), indices.end(), 0u);
  if (machine.seed != 0)
    for (unsigned i = n; i > 1; --i) std::swap(indices[i - 1], indices[random_bits() % i]);
  return indices;
}

void enter() {
  (*machine.body)();
  machine.fibers[machine.current].state = State::kDone;
  _longjmp(machine.home, 1);
}

// Gives the processor back; returns when the fiber is resumed.
void yield(State state) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.state = state;
  if (_setjmp(fiber.at) == 0) _longjmp(machine.home, 1);
}

void resume(unsigned index) {
  machine.current = index;
  Fiber& fiber = machine.fibers[index];
  if (_setjmp(machine.home) != 0) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

void prepare(unsigned index) {
  Fiber& fiber = machine.fibers[index];
  fiber.state = State::kReady;
  fiber.started = false;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = machine.stacks.data() + index * kStackBytes;
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
}

// Lets the lanes of a mask go on once all of them wait for the same thing.
void release_warp(unsigned first, unsigned lane) {
  const Fiber& waiting = machine.fibers[first + lane];
  uint32_t brought[32];
  for (unsigned i = 0; i < 32; ++i) {
    brought[i] = 0xFFFFFFFFu;  // of a lane that does not take part: NaN
    if (!(waiting.mask >> i & 1)) continue;
    // a warp at the block's end has fewer lanes, and CUDA lets a mask name the absent ones
    if (first + i >= machine.block) continue;
    const Fiber& other = machine.fibers[first + i];
    if (other.state != State::kAtWarp || other.mask != waiting.mask || other.kind != waiting.kind)
      return;
    brought[i] = other.bits;
  }
  const unsigned mask = waiting.mask;
  for (unsigned i = 0; i < 32 && first + i < machine.block; ++i) {
    if (!(mask >> i & 1)) continue;
    Fiber& fiber = machine.fibers[first + i];
    fiber.bits = brought[fiber.source];
    fiber.state = State::kReady;
  }
}

void release_block() {
  for (const Fiber& fiber : machine.fibers)
    if (fiber.state != State::kAtBlock && fiber.state != State::kDone) return;
  for (Fiber& fiber : machine.fibers)
    if (fiber.state == State::kAtBlock) fiber.state = State::kReady;
}

// Whether any thread can go on.
bool release() {
  for (unsigned i = 0; i < machine.block; ++i)
    if (machine.fibers[i].state == State::kAtWarp) release_warp(i / 32 * 32, i % 32);
  release_block();
  for (const Fiber& fiber : machine.fibers)
    if (fiber.state == State::kReady) return true;
  return false;
}

bool finished() {
  for (const Fiber& fiber : machine.fibers)
    if (fiber.state != State::kDone) return false;
  return true;
}

bool run_block() {
  for (unsigned i = 0; i < machine.block; ++i) prepare(i);
  do {
    for (const unsigned i : order(machine.block))
      if (machine.fibers[i].state == State::kReady && machine.error.empty()) resume(i);
  } while (machine.error.empty() && release());
  return finished();
}

// A fault of a kernel ends the launch; SA_NODEFER, since nobody returns from here. Kernels are
// compiled to trap on an address that is not a multiple of what is read there.
void on_fault(int signal, siginfo_t* info, void*) {
  char text[64] = "misaligned access";
  if (signal == SIGSEGV) std::snprintf(text, sizeof text, "invalid access to %p", info->si_addr);
  machine.error = text;
  _longjmp(machine.home, 2);
}

class FaultHandler {
 public:
  FaultHandler() {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &action, &before_[i]);
  }
  ~FaultHandler() {
    for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &before_[i], nullptr);
  }

 private:
  static constexpr int kSignals[] = {SIGSEGV, TRAP_SIGNAL};
  struct sigaction before_[2];
};

// Memory that ends where an inaccessible page begins, full of NaN.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : page_(sysconf(_SC_PAGESIZE)), bytes_((bytes + 15) / 16 * 16) {
    pages_ = (bytes_ + page_ - 1) / page_ * page_;
    memory_ = static_cast<char*>(
        mmap(nullptr, pages_ + page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(memory_ + pages_, page_, PROT_NONE);
  }
  ~Guarded() { munmap(memory_, pages_ + page_); }
  char* begin() const { return memory_ + pages_ - bytes_; }
  void poison() const { std::memset(begin(), 0xFF, bytes_); }

 private:
  size_t page_, bytes_, pages_;
  char* memory_;
};

std::string refusal(unsigned grid, unsigned block, size_t shared_bytes) {
  if (grid == 0 || grid > INT32_MAX) return "invalid grid of " + std::to_string(grid);
  if (block == 0 || block > kMaxThreads) return "invalid block of " + std::to_string(block);
  if (shared_bytes > kMaxShared) return std::to_string(shared_bytes) + " bytes of shared memory";
  return "";
}

}  // namespace

void launch(unsigned grid, unsigned block, size_t shared_bytes, void*,
            const std::function<void()>& body) {
  machine.error = refusal(grid, block, shared_bytes);
  if (!machine.error.empty()) return;
  const FaultHandler handler;
  if (machine.most_blocks != 0) grid = std::min(grid, machine.most_blocks);
  machine.grid = grid;
  machine.block = block;
  machine.body = &body;
  machine.fibers.resize(block);
  machine.stacks.resize(block * kStackBytes);
  const Guarded shared(shared_bytes);
  machine.shared = shared.begin();
  for (const unsigned index : order(grid)) {
    machine.current_block = index;
    shared.poison();
    if (__start_emulated_shared)
      std::memset(__start_emulated_shared, 0xFF, __stop_emulated_shared - __start_emulated_shared);
    const bool ended = run_block();
    if (!ended && machine.error.empty()) machine.error = "some threads wait forever";
    if (!ended) return;
  }
}

Index current_thread() { return {machine.current, 0, 0}; }
Index current_block() { return {machine.current_block, 0, 0}; }
Index block_size() { return {machine.block, 1, 1}; }
Index grid_size() { return {machine.grid, 1, 1}; }
void* dynamic_shared() { return machine.shared; }

void wait_for_block() { yield(State::kAtBlock); }

uint32_t exchange(Kind kind, unsigned mask, uint32_t bits, int source) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.kind = kind;
  fiber.mask = mask;
  fiber.bits = bits;
  fiber.source = source;
  yield(State::kAtWarp);
  return fiber.bits;
}

int take_error() {
  machine.last_error = std::exchange(machine.error, "");
  return machine.last_error.empty() ? 0 : 1;
}

const char* error_text() { return machine.last_error.c_str(); }

void set_order(uint64_t seed) { machine.seed = seed; }

void limit_grid(unsigned most_blocks) { machine.most_blocks = most_blocks; }

}  // namespace emulator
