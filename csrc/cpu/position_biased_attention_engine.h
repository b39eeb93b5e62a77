// Wraps the kernels of position_biased_attention into the table of functions the launcher calls.
#pragma once

#include "cpu/position_bias_table.h"
#include "cpu/position_biased_attention_backward.h"
#include "cpu/position_biased_attention_forward.h"

namespace survfuse {
namespace {

template <class T, class Net>
int64_t biased_scratch(const BiasedParams& in, bool backward) {
  return backward ? BiasedBackwardKernel<T, Net>(in).lay_out(Arena{nullptr})
                  : BiasedForwardKernel<T, Net>(in).lay_out(Arena{nullptr});
}

template <class T>
BiasedEngine make_biased_engine() {
  return {[](const BiasedParams& in, bool backward) {
            return in.reach ? biased_scratch<T, BiasTable<T>>(in, backward)
                            : biased_scratch<T, BiasMlp<T>>(in, backward);
          },
          [](const BiasedForward& p, const BiasedItem& item, char* scratch) {
            p.in.reach ? BiasedForwardKernel<T, BiasTable<T>>::run(p, item, scratch)
                       : BiasedForwardKernel<T, BiasMlp<T>>::run(p, item, scratch);
          },
          [](const BiasedBackward& p, const BiasedItem& item, const KeySums& sums,
             void* d_parameters, char* scratch) {
            p.in.reach
                ? BiasedBackwardKernel<T, BiasTable<T>>::run(p, item, sums, d_parameters, scratch)
                : BiasedBackwardKernel<T, BiasMlp<T>>::run(p, item, sums, d_parameters, scratch);
          }};
}

}  // namespace
}  // namespace survfuse
