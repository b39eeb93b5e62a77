// Wraps PoolBagKernel<P, Acc> into the table of functions the launcher calls.
#pragma once

#include "cpu/pool_bag_kernel.h"

namespace survfuse {
namespace {

template <class P, class Acc>
PoolBagEngine make_engine() {
  using Kernel = PoolBagKernel<P, Acc>;
  return {&Kernel::scratch_bytes,
          [](const PoolBagForward& p, const WorkItem& item, char* scratch, void* z, void* max,
             void* sum, void* weight_sum) {
            Kernel::forward(p, item, scratch, static_cast<Acc*>(z), static_cast<Acc*>(max),
                            static_cast<Acc*>(sum), static_cast<Acc*>(weight_sum));
          },
          [](const PoolBagBackward& p, const WorkItem& item, char* scratch, void* d_rows,
             void* d_logit_sum) {
            Kernel::backward(p, item, scratch, static_cast<Acc*>(d_rows),
                             static_cast<Acc*>(d_logit_sum));
          }};
}

}  // namespace
}  // namespace survfuse
