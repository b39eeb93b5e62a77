// Launchers of gated_attention_pool on the CPU: the rows of all bags are cut into chunks; what
// chunks leave behind is merged in index order.
#include "gated_attention_pool.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/gated_attention_pool_plan.h"
#include "cpu/parallel.h"

namespace survfuse {
namespace {

constexpr int64_t kForwardSlotBytes = 4 << 20, kBackwardSlotBytes = 32 << 20;  // all together
constexpr int64_t kMinSlots = 4, kMaxSlots = 128, kMinChunk = 504, kChunkStep = 504;

int64_t round_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

bool is_double(const GatedParams& in) { return in.bag_type == ElementType::kFloat64; }

GatedEngine choose_engine(const GatedParams& in) {
  const CpuIsa isa = in.isa == CpuIsa::kAuto ? best_isa() : in.isa;
  if (!isa_available(isa))
    throw std::invalid_argument(std::string("this processor has no ") + isa_name(isa));
#if SURVFUSE_X86
  if (isa == CpuIsa::kAvx512Bf16 && in.bag_type == ElementType::kBFloat16)
    return gated_engine_avx512bf16();
  if (isa == CpuIsa::kAvx512 || isa == CpuIsa::kAvx512Bf16)
    return gated_engine_avx512(is_double(in));
  if (isa == CpuIsa::kAvx2) return gated_engine_avx2(is_double(in));
#endif
  return gated_engine_plain(is_double(in));
}

// Everything that follows from the sizes, the same for the workspace and for the call.
struct Plan {
  GatedEngine engine;
  PackedRows rows;
  std::vector<GatedChunk> chunks;
  std::vector<int64_t> waves;  // the first chunk of each, and how many there are
  int64_t packed_bytes, scratch_bytes, slot_bytes, n_slots;

  // apart: chunks of different bags never run together, since the bags share rows.
  template <class Acc>
  static Plan make(const GatedParams& in, bool backward, bool apart) {
    Plan plan{choose_engine(in), {}, {}, {}, 0, 0, 0, 0};
    plan.packed_bytes = round_to(plan.engine.packed_bytes(in), 4096);
    plan.scratch_bytes = round_to(plan.engine.scratch_bytes(in), 4096);
    plan.slot_bytes = forward_slot_bytes<Acc>(in);
    if (backward)
      plan.slot_bytes = GatedSlot<Acc>::bytes(plan.engine.hidden_columns(in),
                                              plan.engine.padded_dim(in), in.n_pools);
    plan.slot_bytes = round_to(plan.slot_bytes, 64);
    std::vector<int64_t>& first = plan.rows.first;
    first.push_back(0);
    for (int64_t b = 0; b < in.n_bags; ++b) first.push_back(first.back() + in.lengths[b]);
    const int64_t room = (backward ? kBackwardSlotBytes : kForwardSlotBytes) / plan.slot_bytes;
    const int64_t most = std::clamp(room, kMinSlots, kMaxSlots), total = first.back();
    // the backward's last chunks are short, so that threads end together
    const int64_t n_short = backward ? most / 4 : 0, n_long = most - n_short;
    const double share = static_cast<double>(total) / (n_long + n_short * 0.25);
    const int64_t size =
        round_to(std::max(kMinChunk, static_cast<int64_t>(std::ceil(share))), kChunkStep);
    for (int64_t b = 0; b < in.n_bags || (!apart && b == 0); b += apart ? 1 : in.n_bags + 1) {
      const int64_t end = apart ? first[b + 1] : total;
      for (int64_t at = apart ? first[b] : 0; at < end; at = plan.chunks.back().end) {
        const int64_t index = plan.chunks.size(), slot = index % most;
        if (slot == 0 || (apart && at == first[b])) plan.waves.push_back(index);
        const int64_t length = slot < n_long ? size : round_to(size / 4, kChunkStep);
        plan.chunks.push_back({at, std::min(at + length, end), slot, index < most});
      }
    }
    plan.waves.push_back(plan.chunks.size());
    plan.n_slots = std::min<int64_t>(plan.chunks.size(), most);
    return plan;
  }

  int64_t workspace(int n_threads) const {
    return packed_bytes + n_threads * scratch_bytes + n_slots * slot_bytes + 64;
  }

  char* slots(const GatedParams& in) const {
    return static_cast<char*>(in.workspace) + packed_bytes + in.n_threads * scratch_bytes;
  }

  // Runs work(chunk, packed, scratch, slot) on all chunks.
  template <class Work>
  void run(const GatedParams& in, bool d_bag, const Work& work) const {
    char* packed = static_cast<char*>(in.workspace);
    engine.pack(in, d_bag, packed);
    for (size_t wave = 0; wave + 1 < waves.size(); ++wave)
      parallel_for(waves[wave + 1] - waves[wave], in.n_threads, [&](int64_t i, int thread) {
        const GatedChunk& chunk = chunks[waves[wave] + i];
        work(chunk, packed, packed + packed_bytes + thread * scratch_bytes,
             slots(in) + chunk.slot * slot_bytes);
      });
  }
};

// The results of a bag that lies in several chunks, from its parts in index order.
template <class Acc>
void merge_bag(const GatedForward& p, const Plan& plan, int64_t bag, std::vector<Acc>& memory) {
  const GatedParams& in = p.in;
  const Acc infinity = static_cast<Acc>(INFINITY);
  const int64_t begin = plan.rows.first[bag], end = plan.rows.first[bag + 1];
  if (begin == end) return;
  const int64_t size = plan.chunks[0].end;
  const int64_t from = begin / size, to = (end - 1) / size;
  if (from == to) return;
  const auto part = [&](int64_t i) {
    char* slot = plan.slots(in) + plan.chunks[i].slot * plan.slot_bytes;
    const bool begins = begin >= plan.chunks[i].begin;
    return GatedPart<Acc>(reinterpret_cast<Acc*>(slot) + (begins ? GatedPart<Acc>::size(in) : 0),
                          in);
  };
  memory.assign(GatedPart<Acc>::size(in), Acc(0));
  const GatedPart<Acc> whole(memory.data(), in);
  for (int64_t k = 0; k < in.n_pools; ++k) {
    Acc top = -infinity;
    for (int64_t i = from; i <= to; ++i) top = std::max(top, part(i).top[k]);
    whole.top[k] = top;
    for (int64_t i = from; i <= to; ++i) {
      const GatedPart<Acc> one = part(i);
      // a part without a maximum holds nothing, or NaN
      const Acc factor = one.top[k] == -infinity ? Acc(1) : std::exp(one.top[k] - top);
      whole.sum[k] += factor * one.sum[k];
      for (int64_t d = 0; d < in.dim; ++d)
        whole.z[k * in.dim + d] += factor * one.z[k * in.dim + d];
    }
  }
  write_gated_result(p, bag, whole);
}

template <class Acc>
void run_forward(const GatedForward& p) {
  const Plan plan = Plan::make<Acc>(p.in, false, false);
  plan.run(p.in, false, [&](const GatedChunk& chunk, char* packed, char* scratch, char* slot) {
    plan.engine.forward(p, plan.rows, chunk, packed, scratch, slot);
  });
  std::vector<Acc> memory;
  for (int64_t bag = 0; bag < p.in.n_bags; ++bag) merge_bag(p, plan, bag, memory);
}

template <class Acc>
void run_backward(const GatedBackward& p) {
  const GatedParams& in = p.in;
  const Plan plan = Plan::make<Acc>(in, true, p.overlapping && (p.d_bag || p.d_bias));
  plan.run(in, p.d_bag != nullptr,
           [&](const GatedChunk& chunk, char* packed, char* scratch, char* slot) {
             plan.engine.backward(p, plan.rows, chunk, packed, scratch, slot);
           });
  const int64_t columns = plan.engine.hidden_columns(in), padded = plan.engine.padded_dim(in);
  const auto slot = [&](int64_t i) {
    return GatedSlot<Acc>(plan.slots(in) + i * plan.slot_bytes, columns, padded);
  };
  // rows [n, width] of the results; part, offset and ld say where they lie in a slot
  const auto gather = [&](void* target, int64_t n, int64_t width, Acc* GatedSlot<Acc>::* part,
                          int64_t offset, int64_t ld) {
    if (!target) return;
    parallel_for(n, width < 64 ? 1 : in.n_threads, [&](int64_t row, int) {
      Acc* to = static_cast<Acc*>(target) + row * width;
      std::fill(to, to + width, Acc(0));
      for (int64_t i = 0; i < plan.n_slots; ++i) {
        const Acc* from = slot(i).*part + offset + row * ld;
        for (int64_t d = 0; d < width; ++d) to[d] += from[d];
      }
    });
  };
  const int64_t hidden = columns / 2;
  using Slot = GatedSlot<Acc>;
  gather(p.d_w_tanh, in.n_hidden, in.dim, &Slot::d_weights, 0, padded);
  gather(p.d_w_gate, in.n_hidden, in.dim, &Slot::d_weights, hidden * padded, padded);
  gather(p.d_b_tanh, 1, in.n_hidden, &Slot::d_biases, 0, 0);
  gather(p.d_b_gate, 1, in.n_hidden, &Slot::d_biases, hidden, 0);
  gather(p.d_w_score, in.n_pools, in.n_hidden, &Slot::d_score, 0, hidden);
}

}  // namespace

int64_t gated_attention_pool_workspace(const GatedParams& in, bool backward) {
  int64_t bytes = 0;
  for (const bool apart : {false, true})
    if (backward || !apart)
      bytes = std::max(bytes, (is_double(in) ? Plan::make<double>(in, backward, apart)
                                             : Plan::make<float>(in, backward, apart))
                                  .workspace(in.n_threads));
  return bytes;
}

void gated_attention_pool_forward_cpu(const GatedForward& p) {
  is_double(p.in) ? run_forward<double>(p) : run_forward<float>(p);
}

void gated_attention_pool_backward_cpu(const GatedBackward& p) {
  is_double(p.in) ? run_backward<double>(p) : run_backward<float>(p);
}

}  // namespace survfuse
