// Launchers of position_biased_attention on the CPU: queries are cut into items by bag and group;
// what items leave behind is merged in index order.
#include "position_biased_attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/position_biased_attention_plan.h"

namespace survfuse {
namespace {

constexpr int64_t kSlotBytes = 32 << 20;  // of the keys' gradients, and of the parameters' again
constexpr int64_t kItems = 64, kMostJobs = 64, kLeastJobs = 4, kItemStep = 64;

int64_t round_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

bool is_double(const BiasedParams& in) { return in.key.type == ElementType::kFloat64; }

int64_t acc_bytes(const BiasedParams& in) { return is_double(in) ? 8 : 4; }

BiasedEngine choose_engine(const BiasedParams& in) {
  const CpuIsa isa = in.isa == CpuIsa::kAuto ? best_isa() : in.isa;
  if (!isa_available(isa))
    throw std::invalid_argument(std::string("this processor has no ") + isa_name(isa));
#if SURVFUSE_X86
  // 16-bit features are widened once per tile: there is nothing for products of bf16 to gain
  if (isa == CpuIsa::kAvx512 || isa == CpuIsa::kAvx512Bf16)
    return biased_engine_avx512(is_double(in));
  if (isa == CpuIsa::kAvx2) return biased_engine_avx2(is_double(in));
#endif
  return biased_engine_plain(is_double(in));
}

// Gradients of one group's keys in a slot: d_key [O, M, d], d_value [O, M, dv], d_pos [M, 2].
int64_t key_slot_size(const BiasedParams& in) {
  return heads_of_group(in) * in.n_keys * (in.dim + in.value_dim) + 2 * in.n_keys;
}

// Everything that follows from the sizes, the same for the workspace and for the call.
struct Plan {
  BiasedEngine engine;
  std::vector<BiasedItem> items;
  int64_t n_jobs, n_slots, scratch_bytes, slot_bytes, parameter_bytes;

  static Plan make(const BiasedParams& in, bool backward) {
    Plan plan{choose_engine(in), {}, 0, 0, 0, 0, 0};
    plan.scratch_bytes = round_to(plan.engine.scratch_bytes(in, backward), 4096);
    plan.slot_bytes = round_to(key_slot_size(in) * acc_bytes(in), 64);
    plan.parameter_bytes = round_to(parameter_count(in) * acc_bytes(in), 64);
    int64_t total = 0;
    for (int64_t b = 0; b < in.n_bags; ++b) total += in.lengths[b];
    int64_t wanted = kItems;
    if (backward) wanted = std::clamp<int64_t>(kSlotBytes / plan.slot_bytes, 1, kItems);
    const int64_t n_rows = round_to((total * in.n_groups + wanted - 1) / wanted, kItemStep);
    for (int64_t b = 0, packed = 0; b < in.n_bags; packed += in.lengths[b], ++b)
      for (int64_t g = 0; g < in.n_groups; ++g) plan.cut(in, b, g, packed, n_rows);
    const int64_t most = std::clamp(kSlotBytes / plan.parameter_bytes, kLeastJobs, kMostJobs);
    plan.n_jobs = std::min<int64_t>(plan.items.size(), backward ? most : plan.items.size());
    return plan;
  }

  int64_t workspace(int n_threads, bool backward) const {
    const int64_t shared = backward ? n_slots * slot_bytes + n_jobs * parameter_bytes : 0;
    return n_threads * scratch_bytes + shared + 64;
  }

  char* scratch(const BiasedParams& in, int thread) const {
    return static_cast<char*>(in.workspace) + thread * scratch_bytes;
  }
  char* slot(const BiasedParams& in, int64_t index) const {
    return scratch(in, in.n_threads) + index * slot_bytes;
  }
  char* parameters(const BiasedParams& in, int64_t job) const {
    return slot(in, n_slots) + job * parameter_bytes;
  }

 private:
  // The items of one bag and group, of n_rows queries each.
  void cut(const BiasedParams& in, int64_t bag, int64_t group, int64_t packed, int64_t n_rows) {
    const int64_t length = in.lengths[bag];
    const int64_t n_parts = length ? (length + n_rows - 1) / n_rows : 0;
    for (int64_t part = 0; part < n_parts; ++part) {
      const int64_t first = part * n_rows;
      items.push_back({bag, group, first, std::min(n_rows, length - first), packed + first, part,
                       n_parts, n_parts > 1 ? n_slots++ : -1});
    }
  }
};

template <class T>
struct Gradients {
  const BiasedBackward& p;
  const Plan& plan;

  // Where an item's gradients of keys go: the results if it is alone, else its slot.
  KeySums sums(const BiasedItem& item) const {
    const BiasedParams& in = p.in;
    const int64_t heads = heads_of_group(in);
    if (item.slot < 0) {
      const int64_t row = item.bag * in.n_keys * in.n_heads + item.group * heads;
      return {at(p.d_key, row * in.dim),
              at(p.d_value, row * in.value_dim),
              at(p.d_key_pos, (item.bag * in.n_groups + item.group) * in.n_keys * 2),
              in.n_heads * in.dim,
              in.dim,
              in.n_heads * in.value_dim,
              in.value_dim};
    }
    T* slot = reinterpret_cast<T*>(plan.slot(in, item.slot));
    T* value = slot + heads * in.n_keys * in.dim;
    T* places = value + heads * in.n_keys * in.value_dim;
    return {p.d_key ? slot : nullptr,
            p.d_value ? value : nullptr,
            p.d_key_pos ? places : nullptr,
            in.dim,
            in.n_keys * in.dim,
            in.value_dim,
            in.n_keys * in.value_dim};
  }

  void clear_slot(const BiasedItem& item) const {
    if (item.slot < 0) return;
    T* slot = reinterpret_cast<T*>(plan.slot(p.in, item.slot));
    std::fill(slot, slot + key_slot_size(p.in), T(0));
  }

  // Adds what the parts of one bag and group left in their slots, in index order.
  void merge(const BiasedItem* parts) const {
    const BiasedParams& in = p.in;
    BiasedItem alone = *parts;
    alone.slot = -1;
    const KeySums to = sums(alone);
    for (int64_t part = 0; part < parts->n_parts; ++part) {
      const KeySums from = sums(parts[part]);
      add(to.d_key, to.row_stride, to.head_stride, from.d_key, from.row_stride, from.head_stride,
          in.dim);
      add(to.d_value, to.value_row_stride, to.value_head_stride, from.d_value,
          from.value_row_stride, from.value_head_stride, in.value_dim);
      T *place = static_cast<T*>(to.d_pos), *more = static_cast<T*>(from.d_pos);
      for (int64_t i = 0; place && i < 2 * in.n_keys; ++i) place[i] += more[i];
    }
  }

 private:
  static void* at(void* data, int64_t element) {
    return data ? static_cast<T*>(data) + element : nullptr;
  }

  void add(void* to, int64_t row, int64_t head, const void* from, int64_t from_row,
           int64_t from_head, int64_t width) const {
    for (int64_t o = 0; to && o < heads_of_group(p.in); ++o)
      for (int64_t j = 0; j < p.in.n_keys; ++j)
        for (int64_t d = 0; d < width; ++d)
          static_cast<T*>(to)[j * row + o * head + d] +=
              static_cast<const T*>(from)[j * from_row + o * from_head + d];
  }
};

template <class T>
void run_backward(const BiasedBackward& p) {
  const BiasedParams& in = p.in;
  const Plan plan = Plan::make(in, true);
  const Gradients<T> gradients{p, plan};
  const int64_t n_items = plan.items.size(), n_parameters = parameter_count(in);
  parallel_for(plan.n_jobs, in.n_threads, [&](int64_t job, int thread) {
    T* d_parameters = reinterpret_cast<T*>(plan.parameters(in, job));
    std::fill(d_parameters, d_parameters + n_parameters, T(0));
    for (int64_t i = job; i < n_items; i += plan.n_jobs) {
      gradients.clear_slot(plan.items[i]);
      plan.engine.backward(p, plan.items[i], gradients.sums(plan.items[i]),
                           p.d_parameters ? d_parameters : nullptr, plan.scratch(in, thread));
    }
  });
  std::vector<const BiasedItem*> shared;
  for (const BiasedItem& item : plan.items)
    if (item.slot >= 0 && item.part == 0) shared.push_back(&item);
  parallel_for(shared.size(), in.n_threads, [&](int64_t i, int) { gradients.merge(shared[i]); });
  T* total = static_cast<T*>(p.d_parameters);
  for (int64_t job = 0; total && job < plan.n_jobs; ++job) {
    const T* part = reinterpret_cast<const T*>(plan.parameters(in, job));
    for (int64_t i = 0; i < n_parameters; ++i) total[i] += part[i];
  }
}

}  // namespace

int64_t position_biased_attention_workspace(const BiasedParams& in, bool backward) {
  return Plan::make(in, backward).workspace(in.n_threads, backward);
}

void position_biased_attention_forward_cpu(const BiasedForward& p) {
  const Plan plan = Plan::make(p.in, false);
  parallel_for(plan.items.size(), p.in.n_threads, [&](int64_t i, int thread) {
    plan.engine.forward(p, plan.items[i], plan.scratch(p.in, thread));
  });
}

void position_biased_attention_backward_cpu(const BiasedBackward& p) {
  is_double(p.in) ? run_backward<double>(p) : run_backward<float>(p);
}

}  // namespace survfuse
