// Launchers of pool_bag on the CPU: choose the instruction set, cut the work, merge in index order.
#include "pool_bag.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/cpu_features.h"
#include "cpu/parallel.h"
#include "cpu/pool_bag_plan.h"

namespace survfuse {
namespace {

constexpr int64_t kPartialBytes = 12 << 20;  // partial results of split bags, all together
constexpr int64_t kMinChunk = 512, kMaxChunks = 128, kChunkStep = 64;

int64_t acc_size(ElementType bag_type) { return bag_type == ElementType::kFloat64 ? 8 : 4; }

int64_t round_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Accumulators of one partial result: z [R, D], then max, sum and weight_sum [R].
int64_t slot_bytes(int64_t n_rows, int64_t dim, ElementType bag_type) {
  return round_to((n_rows * dim + 3 * n_rows) * acc_size(bag_type), 64);
}

int64_t chunk_rows(int64_t n_rows, int64_t dim, int64_t total, ElementType bag_type) {
  const int64_t fit = kPartialBytes / std::max<int64_t>(1, slot_bytes(n_rows, dim, bag_type));
  const int64_t chunks = std::clamp<int64_t>(fit, 2, kMaxChunks);
  return round_to(std::max(kMinChunk, (total + chunks - 1) / chunks), kChunkStep);
}

struct Plan {
  std::vector<WorkItem> items;
  std::vector<int64_t> first_item;  // [B + 1]
  int64_t n_slots = 0;
};

Plan make_plan(const PoolBagParams& in) {
  int64_t total = 0;
  for (int64_t b = 0; b < in.n_bags; ++b) total += in.lengths[b];
  const int64_t chunk = chunk_rows(in.n_rows, in.dim, total, in.bag_type);
  Plan plan;
  for (int64_t b = 0; b < in.n_bags; ++b) {
    plan.first_item.push_back(plan.items.size());
    const int64_t length = in.lengths[b],
                  n_items = std::max<int64_t>(1, (length + chunk - 1) / chunk);
    for (int64_t i = 0; i < n_items; ++i) {
      const int64_t position = i * chunk;
      plan.items.push_back({b, in.starts[b] + position, position,
                            std::min(chunk, length - position), n_items > 1 ? plan.n_slots++ : -1});
    }
  }
  plan.first_item.push_back(plan.items.size());
  return plan;
}

PoolBagEngine choose_engine(const PoolBagParams& in) {
  const bool is_double = in.bag_type == ElementType::kFloat64;
  const CpuIsa isa = in.isa == CpuIsa::kAuto ? best_isa() : in.isa;
  if (!isa_available(isa))
    throw std::invalid_argument(std::string("this processor has no ") + isa_name(isa));
#if SURVFUSE_X86
  if (isa == CpuIsa::kAvx512Bf16 && in.bag_type == ElementType::kBFloat16)
    return pool_bag_engine_avx512bf16();
  if (isa == CpuIsa::kAvx512 || isa == CpuIsa::kAvx512Bf16)
    return pool_bag_engine_avx512(is_double);
  if (isa == CpuIsa::kAvx2) return pool_bag_engine_avx2(is_double);
#endif
  return pool_bag_engine_plain(is_double);
}

// The largest scratch any engine of this build may want; more vectors mean more padding.
int64_t scratch_bound(int64_t n_rows, int64_t dim, ElementType bag_type) {
  PoolBagParams in{};
  in.n_rows = n_rows;
  in.dim = dim;
  in.bag_type = bag_type;
  const bool is_double = bag_type == ElementType::kFloat64;
  int64_t bytes = pool_bag_engine_plain(is_double).scratch_bytes(in);
#if SURVFUSE_X86
  bytes = std::max(bytes, pool_bag_engine_avx2(is_double).scratch_bytes(in));
  bytes = std::max(bytes, pool_bag_engine_avx512(is_double).scratch_bytes(in));
  if (!is_double) bytes = std::max(bytes, pool_bag_engine_avx512bf16().scratch_bytes(in));
#endif
  return round_to(bytes, 4096);
}

template <class Acc>
struct Partial {
  Acc *z, *max, *sum, *weight_sum;
};

template <class Acc>
Partial<Acc> slot_at(const PoolBagParams& in, char* slots, int64_t slot) {
  Acc* z = reinterpret_cast<Acc*>(slots + slot * slot_bytes(in.n_rows, in.dim, in.bag_type));
  Acc* max = z + in.n_rows * in.dim;
  return {z, max, max + in.n_rows, max + 2 * in.n_rows};
}

// pooled, lse, weight_sum of one bag from its partial results, in index order.
template <class Acc>
void merge_bag(const PoolBagForward& p, const Plan& plan, int64_t bag, char* slots, char* own) {
  const PoolBagParams& in = p.in;
  const int64_t begin = plan.first_item[bag], end = plan.first_item[bag + 1];
  const auto part = [&](int64_t i) {
    const int64_t slot = plan.items[i].slot;
    Partial<Acc> partial = slot_at<Acc>(in, slot < 0 ? own : slots, slot < 0 ? 0 : slot);
    // the only item of a bag left its z in the output itself
    if (slot < 0) partial.z = static_cast<Acc*>(p.pooled) + bag * in.n_rows * in.dim;
    return partial;
  };
  const Acc infinity = static_cast<Acc>(INFINITY);
  for (int64_t r = 0; r < in.n_rows; ++r) {
    const int64_t at = bag * in.n_rows + r;
    Acc top = -infinity, sum = 0, weight_sum = 0;
    for (int64_t i = begin; i < end; ++i) top = std::max(top, part(i).max[r]);
    const auto factor = [&](int64_t i) {
      const Acc max = part(i).max[r];
      return max == -infinity ? Acc(0) : std::exp(max - top);
    };
    bool broken = false;  // a NaN weight reaches sum, but its part may have no maximum
    for (int64_t i = begin; i < end; ++i) {
      const Partial<Acc> partial = part(i);
      broken |= !(partial.sum[r] == partial.sum[r]);
      sum += factor(i) * partial.sum[r];
      weight_sum += factor(i) * partial.weight_sum[r];
    }
    if (broken) sum = weight_sum = static_cast<Acc>(NAN);
    const bool empty = sum == 0;
    const Acc inverse = empty ? 0 : 1 / sum;
    static_cast<Acc*>(p.lse)[at] =
        empty ? -infinity : (broken ? (top == infinity ? top : sum) : top + std::log(sum));
    static_cast<Acc*>(p.weight_sum)[at] =
        empty ? 0 : (in.dropout_p > 0 || broken ? weight_sum * inverse : Acc(1));
    Acc* out = static_cast<Acc*>(p.pooled) + at * in.dim;
    if (end - begin == 1) {
      for (int64_t d = 0; d < in.dim; ++d) out[d] = empty ? 0 : out[d] * inverse;
      continue;
    }
    std::memset(out, 0, in.dim * sizeof(Acc));
    for (int64_t i = begin; i < end; ++i) {
      const Acc weight = factor(i) * inverse;
      if (weight == 0) continue;
      const Acc* z = part(i).z + r * in.dim;
      for (int64_t d = 0; d < in.dim; ++d) out[d] += weight * z[d];
    }
    for (int64_t d = 0; broken && d < in.dim; ++d) out[d] = static_cast<Acc>(NAN);
  }
}

template <class Acc>
void run_forward(const PoolBagForward& p, const Plan& plan) {
  const PoolBagParams& in = p.in;
  const PoolBagEngine engine = choose_engine(in);
  const int64_t scratch = scratch_bound(in.n_rows, in.dim, in.bag_type);
  char* base = static_cast<char*>(in.workspace);
  char* slots = base + in.n_threads * scratch;
  // max, sum and weight_sum of bags that are one item lie behind the slots
  char* small = slots + plan.n_slots * slot_bytes(in.n_rows, in.dim, in.bag_type);
  const int64_t small_bytes = round_to(3 * in.n_rows * sizeof(Acc), 64);
  const auto single = [&](int64_t bag) {
    // slot_at() adds R * D elements to reach max
    return small + bag * small_bytes - in.n_rows * in.dim * sizeof(Acc);
  };
  parallel_for(plan.items.size(), in.n_threads, [&](int64_t i, int thread) {
    const WorkItem& item = plan.items[i];
    Partial<Acc> out =
        slot_at<Acc>(in, item.slot < 0 ? single(item.bag) : slots, item.slot < 0 ? 0 : item.slot);
    if (item.slot < 0) out.z = static_cast<Acc*>(p.pooled) + item.bag * in.n_rows * in.dim;
    engine.forward(p, item, base + thread * scratch, out.z, out.max, out.sum, out.weight_sum);
  });
  parallel_for(in.n_bags, in.n_threads,
               [&](int64_t b, int) { merge_bag<Acc>(p, plan, b, slots, single(b)); });
}

template <class Acc>
void run_backward(const PoolBagBackward& p, const Plan& plan) {
  const PoolBagParams& in = p.in;
  const PoolBagEngine engine = choose_engine(in);
  const int64_t scratch = scratch_bound(in.n_rows, in.dim, in.bag_type);
  char* base = static_cast<char*>(in.workspace);
  char* slots = base + in.n_threads * scratch;
  const int64_t size = in.n_rows * in.dim;
  const auto logit_sum = [&](const WorkItem& item) {
    return item.slot < 0 ? static_cast<Acc*>(p.d_logit_sum) + item.bag * in.n_rows
                         : slot_at<Acc>(in, slots, item.slot).sum;
  };
  const auto target = [&](const WorkItem& item) {
    if (!p.d_rows) return static_cast<Acc*>(nullptr);
    return item.slot < 0 ? static_cast<Acc*>(p.d_rows) + item.bag * size
                         : slot_at<Acc>(in, slots, item.slot).z;
  };
  const auto run = [&](int64_t begin, int64_t end) {
    parallel_for(end - begin, in.n_threads, [&](int64_t i, int thread) {
      const WorkItem& item = plan.items[begin + i];
      engine.backward(p, item, base + thread * scratch, target(item), logit_sum(item));
    });
  };
  if (p.overlapping) {
    for (int64_t b = 0; b < in.n_bags; ++b) run(plan.first_item[b], plan.first_item[b + 1]);
  } else {
    run(0, plan.items.size());
  }
  const auto merge = [&](Acc* out, int64_t n, int64_t bag, const auto& part) {
    const int64_t begin = plan.first_item[bag], end = plan.first_item[bag + 1];
    if (end - begin == 1) return;
    std::memset(out, 0, n * sizeof(Acc));
    for (int64_t i = begin; i < end; ++i) {
      const Acc* values = part(plan.items[i]);
      for (int64_t k = 0; k < n; ++k) out[k] += values[k];
    }
  };
  parallel_for(in.n_bags, in.n_threads, [&](int64_t b, int) {
    merge(static_cast<Acc*>(p.d_logit_sum) + b * in.n_rows, in.n_rows, b, logit_sum);
    if (p.d_rows) merge(static_cast<Acc*>(p.d_rows) + b * size, size, b, target);
  });
}

}  // namespace

int64_t pool_bag_workspace(int64_t n_bags, int64_t n_rows, int64_t dim, int64_t total,
                           ElementType bag_type, int n_threads) {
  const int64_t chunk = chunk_rows(n_rows, dim, total, bag_type);
  // a bag longer than a chunk has at most length / chunk + 1 items
  const int64_t n_slots = total / chunk + std::min(n_bags, total / chunk);
  return n_threads * scratch_bound(n_rows, dim, bag_type) +
         n_slots * slot_bytes(n_rows, dim, bag_type) +
         n_bags * round_to(3 * n_rows * acc_size(bag_type), 64);
}

void pool_bag_forward_cpu(const PoolBagForward& p) {
  const Plan plan = make_plan(p.in);
  p.in.bag_type == ElementType::kFloat64 ? run_forward<double>(p, plan)
                                         : run_forward<float>(p, plan);
}

void pool_bag_backward_cpu(const PoolBagBackward& p) {
  const Plan plan = make_plan(p.in);
  p.in.bag_type == ElementType::kFloat64 ? run_backward<double>(p, plan)
                                         : run_backward<float>(p, plan);
}

}  // namespace survfuse
