// Wraps the kernels of gated_attention_pool into the table of functions the launcher calls.
#pragma once

#include "cpu/gated_attention_pool_backward.h"
#include "cpu/gated_attention_pool_forward.h"

namespace survfuse {
namespace {

template <class P, class Acc>
GatedEngine make_gated_engine() {
  using Tile = GatedTile<P, Acc>;
  using Weights = GatedWeights<P, Acc>;
  return {[](const GatedParams& in) { return Weights(in).lay_out(Arena{nullptr}); },
          [](const GatedParams& in, bool d_bag, char* packed) {
            Weights weights(in);
            weights.lay_out(Arena{packed});
            weights.pack(in, d_bag);
          },
          [](const GatedParams& in) {
            const Weights weights(in);
            return std::max(GatedForwardKernel<P, Acc>(in, weights).lay_out(Arena{nullptr}),
                            GatedBackwardKernel<P, Acc>(in, weights).lay_out(Arena{nullptr}));
          },
          [](const GatedParams& in) { return Weights(in).columns; },
          [](const GatedParams& in) { return Tile::padded_dim(in); },
          &GatedForwardKernel<P, Acc>::run,
          &GatedBackwardKernel<P, Acc>::run};
}

}  // namespace
}  // namespace survfuse
