// What the instruction-set files offer the launcher, and how the launcher cuts the work.
#pragma once

#include <cstdint>

#include "pool_bag.h"

namespace survfuse {

// A range of one bag, done by one thread. The cut depends on sizes alone, never on the threads, so
// the sums have one order.
struct WorkItem {
  int64_t bag, row, position, length;  // position: of its first row within the bag
  int64_t slot;                        // partial result in the workspace; -1: the bag's only item
};

// One per instruction set and accumulation type; void* are of that type.
struct PoolBagEngine {
  int64_t (*scratch_bytes)(const PoolBagParams&);
  void (*forward)(const PoolBagForward&, const WorkItem&, char* scratch, void* z, void* max,
                  void* sum, void* weight_sum);
  void (*backward)(const PoolBagBackward&, const WorkItem&, char* scratch, void* d_rows,
                   void* d_logit_sum);
};

PoolBagEngine pool_bag_engine_plain(bool is_double);
PoolBagEngine pool_bag_engine_avx2(bool is_double);
PoolBagEngine pool_bag_engine_avx512(bool is_double);
PoolBagEngine pool_bag_engine_avx512bf16();  // bf16 bags only

}  // namespace survfuse
