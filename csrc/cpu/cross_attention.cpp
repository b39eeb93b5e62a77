// Launchers of cross_attention on the CPU: the long side is cut into chunks; what chunks add to the
// short side is merged in index order, bag by bag.
#include "cross_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/cross_attention_plan.h"
#include "cpu/parallel.h"

namespace survfuse {
namespace {

constexpr int64_t kSlotBytes = 12 << 20;  // slots in flight, all together
constexpr int64_t kMinChunk = 512, kMaxChunks = 128, kChunkStep = 64;

int64_t round_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

bool is_double(const CrossAttentionParams& in) { return in.key.type == ElementType::kFloat64; }

// Rows are written in the type of accumulation or in 16 bits; another would be memory misread.
void check_written(const char* name, ElementType type, const CrossAttentionParams& in) {
  const ElementType own = is_double(in) ? ElementType::kFloat64 : ElementType::kFloat32;
  if (type != own && type != ElementType::kBFloat16 && type != ElementType::kFloat16)
    throw std::invalid_argument(
        std::string(name) + " is " +
        (is_double(in) ? "fp32 beside fp64 keys" : "fp64 beside other keys") +
        "; rows are written in the type of the sums, or in 16 bits");
}

CrossAttentionEngine choose_engine(const CrossAttentionParams& in) {
  const CpuIsa isa = in.isa == CpuIsa::kAuto ? best_isa() : in.isa;
  if (!isa_available(isa))
    throw std::invalid_argument(std::string("this processor has no ") + isa_name(isa));
#if SURVFUSE_X86
  if (isa == CpuIsa::kAvx512Bf16 && in.key.type == ElementType::kBFloat16)
    return cross_attention_engine_avx512bf16();
  if (isa == CpuIsa::kAvx512 || isa == CpuIsa::kAvx512Bf16)
    return cross_attention_engine_avx512(is_double(in));
  if (isa == CpuIsa::kAvx2) return cross_attention_engine_avx2(is_double(in));
#endif
  return cross_attention_engine_plain(is_double(in));
}

// Everything that follows from the sizes, the same for the workspace and for the call.
struct Plan {
  Sides sides;
  int64_t slot_bytes = 0, scratch_bytes = 0, n_slots = 0;
  std::vector<WorkItem> items;      // slot: place within its wave
  std::vector<int64_t> first_item;  // [B + 1]
  std::vector<int64_t> out_rows;    // [B] of each bag's first query in the results
  std::vector<int64_t> wave_bags;   // first bag of each wave, and B

  explicit Plan(const CrossAttentionParams& in) : sides(in) {}

  // A wave is as many bags as have slots together; `apart`: one bag each, in their order.
  template <class Acc>
  static Plan make(const CrossAttentionParams& in, bool backward, bool apart) {
    Plan plan(in);
    const Sides& sides = plan.sides;
    plan.scratch_bytes = round_to(choose_engine(in).scratch_bytes(in, sides.short_max), 4096);
    // with few keys the forward needs no merging
    const bool merges = in.few_queries || backward;
    plan.slot_bytes = merges ? Slot<Acc>::bytes(in, sides.short_max, backward) : 0;
    int64_t total = 0;
    for (int64_t b = 0; b < in.n_bags; ++b) total += sides.long_lengths[b];
    const int64_t room = kSlotBytes / std::max<int64_t>(1, plan.slot_bytes);
    const int64_t chunks = std::clamp<int64_t>(room, 2, kMaxChunks);
    const int64_t chunk =
        merges ? round_to(std::max(kMinChunk, (total + chunks - 1) / chunks), kChunkStep)
               : kMinChunk;
    int64_t out_row = 0, used = 0;
    for (int64_t b = 0; b < in.n_bags; ++b) {
      const int64_t length = sides.long_lengths[b], n_items = (length + chunk - 1) / chunk;
      if (b == 0 || apart || used + n_items > std::max<int64_t>(room, 1)) {
        plan.wave_bags.push_back(b);
        used = 0;
      }
      plan.first_item.push_back(plan.items.size());
      plan.out_rows.push_back(out_row);
      for (int64_t i = 0; i < n_items; ++i)
        plan.items.push_back({b, sides.long_starts[b] + i * chunk, i * chunk,
                              std::min(chunk, length - i * chunk), used + i});
      used += n_items;
      plan.n_slots = std::max(plan.n_slots, used);
      out_row += in.query_lengths[b];
    }
    plan.first_item.push_back(plan.items.size());
    plan.wave_bags.push_back(in.n_bags);
    return plan;
  }

  int64_t workspace(int n_threads) const {
    return n_threads * scratch_bytes + n_slots * slot_bytes + 64;
  }
};

// Runs `work` on the items of one wave of bags after the other, and `merge` on its bags.
template <class Work, class Merge>
void run_waves(const Plan& plan, const CrossAttentionParams& in, bool merge_in_order,
               const Work& work, const Merge& merge) {
  char* base = static_cast<char*>(in.workspace);
  char* slots = base + in.n_threads * plan.scratch_bytes;
  for (size_t w = 0; w + 1 < plan.wave_bags.size(); ++w) {
    const int64_t first_bag = plan.wave_bags[w], n_bags = plan.wave_bags[w + 1] - first_bag;
    const int64_t begin = plan.first_item[first_bag];
    parallel_for(plan.first_item[first_bag + n_bags] - begin, in.n_threads,
                 [&](int64_t i, int thread) {
                   const WorkItem& item = plan.items[begin + i];
                   work(item, plan.out_rows[item.bag], base + thread * plan.scratch_bytes,
                        slots + item.slot * plan.slot_bytes);
                 });
    parallel_for(n_bags, merge_in_order ? 1 : in.n_threads,
                 [&](int64_t b, int) { merge(first_bag + b, slots); });
  }
}

// out and lse of one bag of few queries from its slots, in index order.
template <class Acc>
void merge_forward(const CrossAttentionForward& p, const Plan& plan, int64_t bag, char* slots) {
  const CrossAttentionParams& in = p.in;
  const int64_t begin = plan.first_item[bag], end = plan.first_item[bag + 1];
  const int64_t n_queries = in.query_lengths[bag], ld = slot_columns(in.value_dim);
  const Acc infinity = static_cast<Acc>(INFINITY);
  if (begin == end) return;
  const auto slot = [&](int64_t i) {
    return Slot<Acc>(slots + plan.items[i].slot * plan.slot_bytes, in, plan.sides.short_max, false);
  };
  for (int64_t h = 0; h < in.n_heads; ++h)
    for (int64_t r = 0; r < n_queries; ++r) {
      const int64_t from = h * n_queries + r, at = (plan.out_rows[bag] + r) * in.n_heads + h;
      Acc top = -infinity, sum = 0;
      bool broken = false;  // a NaN weight reaches sum, but its part may have no maximum
      for (int64_t i = begin; i < end; ++i) top = std::max(top, slot(i).second[from]);
      const auto factor = [&](int64_t i) {
        const Acc max = slot(i).second[from];
        return max == -infinity ? Acc(0) : std::exp(max - top);
      };
      for (int64_t i = begin; i < end; ++i) {
        const Acc part = slot(i).third[from];
        broken |= !(part == part);
        sum += factor(i) * part;
      }
      if (broken) sum = static_cast<Acc>(NAN);
      const bool empty = sum == 0;
      static_cast<Acc*>(p.lse)[at] =
          empty ? -infinity : (broken ? (top == infinity ? top : sum) : top + std::log(sum));
      Acc* out = static_cast<Acc*>(p.out) + at * in.value_dim;
      for (int64_t i = begin; i < end && !empty; ++i) {
        const Acc weight = factor(i) / sum;
        const Acc* z = slot(i).first + from * ld;
        for (int64_t d = 0; weight != 0 && d < in.value_dim; ++d) out[d] += weight * z[d];
      }
      for (int64_t d = 0; broken && d < in.value_dim; ++d) out[d] = static_cast<Acc>(NAN);
    }
}

// Adds a bag's gradients of its short rows, in index order.
template <class Acc>
void merge_backward(const CrossAttentionBackward& p, const Plan& plan, int64_t bag, char* slots) {
  const CrossAttentionParams& in = p.in;
  const int64_t start = plan.sides.short_starts[bag], n_short = plan.sides.short_lengths[bag];
  const auto add = [&](void* target, int64_t width, int64_t ld, Acc* Slot<Acc>::* part) {
    if (!target) return;
    for (int64_t i = plan.first_item[bag]; i < plan.first_item[bag + 1]; ++i) {
      const Slot<Acc> slot(slots + plan.items[i].slot * plan.slot_bytes, in, plan.sides.short_max,
                           true);
      for (int64_t h = 0; h < in.n_heads; ++h)
        for (int64_t r = 0; r < n_short; ++r) {
          const Acc* from = slot.*part + (h * n_short + r) * ld;
          Acc* to = static_cast<Acc*>(target) + ((start + r) * in.n_heads + h) * width;
          for (int64_t d = 0; d < width; ++d) to[d] += from[d];
        }
    }
  };
  add(in.few_queries ? p.d_query : p.d_key, in.dim, slot_columns(in.dim), &Slot<Acc>::first);
  if (in.few_queries) return;
  add(p.d_value, in.value_dim, slot_columns(in.value_dim), &Slot<Acc>::second);
  if (!p.d_bias) return;
  // one number per key: the heads are added up
  for (int64_t i = plan.first_item[bag]; i < plan.first_item[bag + 1]; ++i) {
    const Slot<Acc> slot(slots + plan.items[i].slot * plan.slot_bytes, in, plan.sides.short_max,
                         true);
    for (int64_t h = 0; h < in.n_heads; ++h)
      for (int64_t r = 0; r < n_short; ++r)
        static_cast<Acc*>(p.d_bias)[(start + r) * in.bias_row_stride + h * in.bias_head_stride] +=
            slot.third[h * n_short + r];
  }
}

template <class Acc>
void run_forward(const CrossAttentionForward& p) {
  const CrossAttentionEngine engine = choose_engine(p.in);
  const Plan plan = Plan::make<Acc>(p.in, false, false);
  run_waves(
      plan, p.in, false,
      [&](const WorkItem& item, int64_t out_row, char* scratch, void* slot) {
        engine.forward(p, plan.sides, item, out_row, scratch, slot);
      },
      [&](int64_t bag, char* slots) {
        if (p.in.few_queries) merge_forward<Acc>(p, plan, bag, slots);
      });
}

template <class Acc>
void run_backward(const CrossAttentionBackward& p) {
  const CrossAttentionEngine engine = choose_engine(p.in);
  const Plan plan = Plan::make<Acc>(p.in, true, p.overlapping);
  run_waves(
      // short sides may overlap too: bags add to them in ascending order
      plan, p.in, true,
      [&](const WorkItem& item, int64_t out_row, char* scratch, void* slot) {
        engine.backward(p, plan.sides, item, out_row, scratch, slot);
      },
      [&](int64_t bag, char* slots) { merge_backward<Acc>(p, plan, bag, slots); });
}

}  // namespace

int64_t cross_attention_workspace(const CrossAttentionParams& in) {
  int64_t bytes = 0;
  for (const bool backward : {false, true})
    for (const bool apart : {false, true})
      bytes = std::max(bytes, (is_double(in) ? Plan::make<double>(in, backward, apart)
                                             : Plan::make<float>(in, backward, apart))
                                  .workspace(in.n_threads));
  return bytes;
}

void cross_attention_forward_cpu(const CrossAttentionForward& p) {
  check_written("out", p.out_type, p.in);
  is_double(p.in) ? run_forward<double>(p) : run_forward<float>(p);
}

void cross_attention_backward_cpu(const CrossAttentionBackward& p) {
  check_written("the long side's gradient", p.d_long_type, p.in);
  is_double(p.in) ? run_backward<double>(p) : run_backward<float>(p);
}

}  // namespace survfuse
