// Wraps the kernels of cross_attention into the table of functions the launcher calls.
#pragma once

#include "cpu/cross_attention_backward.h"
#include "cpu/cross_attention_forward.h"

namespace survfuse {
namespace {

template <class P, class Acc>
CrossAttentionEngine make_engine() {
  return {[](const CrossAttentionParams& in, int64_t short_max) {
            return CrossAttentionTile<P, Acc>(in, short_max, short_max).lay_out(Arena{nullptr});
          },
          &CrossAttentionForwardKernel<P, Acc>::run, &CrossAttentionBackwardKernel<P, Acc>::run};
}

}  // namespace
}  // namespace survfuse
