// What the instruction-set files offer the launcher of cross_attention.
#pragma once

#include "cpu/pool_bag_plan.h"
#include "cross_attention.h"

namespace survfuse {

// The ranges of the two sides: the short one is held whole, the long one is walked in tiles.
struct Sides {
  const int64_t *short_starts, *short_lengths, *long_starts, *long_lengths;
  int64_t short_max;  // rows of the largest short side

  explicit Sides(const CrossAttentionParams& in)
      : short_starts(in.few_queries ? in.query_starts : in.key_starts),
        short_lengths(in.few_queries ? in.query_lengths : in.key_lengths),
        long_starts(in.few_queries ? in.key_starts : in.query_starts),
        long_lengths(in.few_queries ? in.key_lengths : in.query_lengths),
        short_max(0) {
    for (int64_t b = 0; b < in.n_bags; ++b)
      if (long_lengths[b] > 0 && short_lengths[b] > short_max) short_max = short_lengths[b];
  }
};

// Columns of a slot's matrices: whole vectors of every instruction set and type.
inline int64_t slot_columns(int64_t dim) { return (dim + 31) / 32 * 32; }

// Accumulators of one chunk, in the type of accumulation.
//   forward, few queries:  first = z [H, R, dv], then max and sum [H, R]
//   backward:              first = gradient of the short rows [H, R, d]; with few keys then that of
//                          the values [H, R, dv] and of the bias [H, R]
template <class Acc>
struct Slot {
  Acc *first, *second, *third;

  Slot(void* memory, const CrossAttentionParams& in, int64_t short_max, bool backward) {
    const int64_t rows = in.n_heads * short_max;
    first = static_cast<Acc*>(memory);
    second = first + rows * slot_columns(backward ? in.dim : in.value_dim);
    third = second + rows * (backward ? slot_columns(in.value_dim) : 1);
  }

  static int64_t bytes(const CrossAttentionParams& in, int64_t short_max, bool backward) {
    const Slot at(nullptr, in, short_max, backward);
    const int64_t end = reinterpret_cast<intptr_t>(at.third + in.n_heads * short_max);
    return (end + 63) / 64 * 64;
  }
};

// One per instruction set and accumulation type. out_row: of the bag's first query in the results.
struct CrossAttentionEngine {
  int64_t (*scratch_bytes)(const CrossAttentionParams&, int64_t short_max);
  void (*forward)(const CrossAttentionForward&, const Sides&, const WorkItem&, int64_t out_row,
                  char* scratch, void* slot);
  void (*backward)(const CrossAttentionBackward&, const Sides&, const WorkItem&, int64_t out_row,
                   char* scratch, void* slot);
};

CrossAttentionEngine cross_attention_engine_plain(bool is_double);
CrossAttentionEngine cross_attention_engine_avx2(bool is_double);
CrossAttentionEngine cross_attention_engine_avx512(bool is_double);
CrossAttentionEngine cross_attention_engine_avx512bf16();  // bf16 only

}  // namespace survfuse
