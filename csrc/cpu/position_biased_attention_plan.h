// What the instruction-set files offer the launcher of position_biased_attention, and how it cuts
// work.
#pragma once

#include <algorithm>
#include <vector>

#include "position_biased_attention.h"

namespace survfuse {

// Queries of one bag with the keys of one group of heads, done by one thread. The cut depends on
// sizes alone, never on the threads, so the sums have one order.
struct BiasedItem {
  int64_t bag, group;
  int64_t first, n_rows;  // of the bag's queries
  int64_t packed;         // the first of them among all bags' queries
  int64_t part, n_parts;  // which of the items with the same keys
  int64_t slot;           // where the keys' gradients go; -1: to the results, being alone
};

// Gradients of one group's keys, [O, M, width] each; null where not wanted.
struct KeySums {
  void *d_key, *d_value, *d_pos;
  int64_t row_stride, head_stride;              // of d_key, in elements
  int64_t value_row_stride, value_head_stride;  // of d_value
};

// One per instruction set and accumulation type.
struct BiasedEngine {
  int64_t (*scratch_bytes)(const BiasedParams&, bool backward);
  void (*forward)(const BiasedForward&, const BiasedItem&, char* scratch);
  // adds to the sums and to the parameters' gradients, unless these are null
  void (*backward)(const BiasedBackward&, const BiasedItem&, const KeySums&, void* d_parameters,
                   char* scratch);
};

inline int64_t heads_of_group(const BiasedParams& in) { return in.n_heads / in.n_groups; }

inline int64_t parameter_count(const BiasedParams& in) {
  const int64_t n_out = heads_of_group(in);
  if (in.reach) return n_out * in.table_size * in.table_size;
  if (in.depth == 0) return 3 * n_out;
  return 3 * in.width + (in.depth - 1) * in.width * (in.width + 1) + n_out * (in.width + 1);
}

BiasedEngine biased_engine_plain(bool is_double);
BiasedEngine biased_engine_avx2(bool is_double);
BiasedEngine biased_engine_avx512(bool is_double);

}  // namespace survfuse
