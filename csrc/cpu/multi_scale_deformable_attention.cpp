// Launchers of multi_scale_deformable_attention on the CPU.
#include "multi_scale_deformable_attention.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/multi_scale_deformable_attention_plan.h"
#include "cpu/parallel.h"

namespace survfuse {
namespace {

constexpr int64_t kQueriesPerItem = 32, kItemsPerThread = 4;

DeformableEngine choose_engine(const DeformableParams& in) {
  const CpuIsa isa = in.isa == CpuIsa::kAuto ? best_isa() : in.isa;
  if (!isa_available(isa))
    throw std::invalid_argument(std::string("this processor has no ") + isa_name(isa));
  if (in.n_rows > INT32_MAX)
    throw std::invalid_argument("value has " + std::to_string(in.n_rows) +
                                " rows; the kernels of processors take 2^31 - 1 of them");
  const bool is_double = in.value_type == ElementType::kFloat64;
#if SURVFUSE_X86
  // narrow heads fill the shorter registers
  const bool wide = is_double || in.dim % 16 == 0 || in.dim > 64;
  if (isa >= CpuIsa::kAvx512 && wide) return deformable_engine_avx512(is_double);
  if (isa >= CpuIsa::kAvx2) return deformable_engine_avx2(is_double);
#endif
  return deformable_engine_plain(is_double);
}

// A piece of scratch for each thread.
struct Scratch {
  int64_t bytes;
  std::vector<char> memory;

  Scratch(const DeformableEngine& engine, const DeformableParams& in)
      : bytes((engine.scratch_bytes(in) + 127) / 64 * 64), memory(bytes * in.n_threads) {}
  char* of(int thread) {
    const auto address = reinterpret_cast<uintptr_t>(memory.data() + thread * bytes);
    return reinterpret_cast<char*>((address + 63) / 64 * 64);
  }
};

// Runs work(begin, end, thread) over blocks of the queries of all batches.
template <class Work>
void for_queries(const DeformableParams& in, const Work& work) {
  const int64_t total = in.n_batches * in.n_queries;
  const int64_t n_items = (total + kQueriesPerItem - 1) / kQueriesPerItem;
  parallel_for(n_items, in.n_threads, [&](int64_t i, int thread) {
    work(i * kQueriesPerItem, std::min((i + 1) * kQueriesPerItem, total), thread);
  });
}

}  // namespace

void deformable_forward_cpu(const DeformableForward& p) {
  const DeformableEngine engine = choose_engine(p.in);
  Scratch scratch(engine, p.in);
  for_queries(p.in, [&](int64_t begin, int64_t end, int thread) {
    engine.forward(p, begin, end, scratch.of(thread));
  });
}

void deformable_backward_cpu(const DeformableBackward& p) {
  const DeformableParams& in = p.in;
  const DeformableEngine engine = choose_engine(in);
  Scratch scratch(engine, in);
  // results do not depend on the cut, so it may depend on the number of threads
  const int64_t heads = in.n_batches * in.n_heads;
  const int64_t wanted = (in.n_threads * kItemsPerThread + heads - 1) / std::max<int64_t>(heads, 1);
  const int64_t parts = std::clamp<int64_t>(wanted, 1, in.n_levels);
  parallel_for(heads * parts, in.n_threads, [&](int64_t i, int thread) {
    const int64_t head = i / parts, part = i % parts;
    engine.backward(p,
                    {head / in.n_heads, head % in.n_heads, part * in.n_levels / parts,
                     (part + 1) * in.n_levels / parts},
                    scratch.of(thread));
  });
  if (in.reference && p.d_weights)
    for_queries(in,
                [&](int64_t begin, int64_t end, int) { engine.softmax_backward(p, begin, end); });
}

}  // namespace survfuse
