// Forward of gated attention pooling over one chunk of packed rows.
#pragma once

#include "cpu/gated_attention_pool_tile.h"

namespace survfuse {
namespace {

template <class P, class Acc>
struct GatedForwardKernel {
  using Tile = GatedTile<P, Acc>;
  using Weights = GatedWeights<P, Acc>;

  Tile t;
  Acc* part;     // of the bag at hand
  Acc* weights;  // [height]

  GatedForwardKernel(const GatedParams& in, const Weights& w) : t(in, w) {}

  int64_t lay_out(Arena arena) {
    t.lay_out(arena);
    part = arena.take<Acc>(GatedPart<Acc>::size(t.in));
    weights = arena.take<Acc>(round_up(t.height, 32));
    return arena.used;
  }

  static void run(const GatedForward& p, const PackedRows& all, const GatedChunk& chunk,
                  char* packed, char* scratch, char* slot) {
    Weights w(p.in);
    w.lay_out(Arena{packed});
    GatedForwardKernel kernel(p.in, w);
    kernel.lay_out(Arena{scratch});
    Tile& t = kernel.t;
    for (int64_t begin = chunk.begin; begin < chunk.end; begin += t.n) {
      t.read(all, begin, chunk.end);
      t.template score<false>();
      for (int64_t i = 0, end; i < t.n; i = end) {
        end = t.run_end(i);
        const int64_t at = begin + i, bag = t.bags[i];
        const bool first = t.positions[i] == 0 || at == chunk.begin;
        kernel.add(i, end, first);
        const bool last = begin + end == all.first[bag + 1] || begin + end == chunk.end;
        if (last) kernel.hand_over(p, all, chunk, bag, slot);
      }
    }
  }

 private:
  // Takes rows [from, to) into the part; first: of this bag in this chunk.
  void add(int64_t from, int64_t to, bool first) {
    const GatedPart<Acc> sums(part, t.in);
    const Acc infinity = static_cast<Acc>(INFINITY);
    const int64_t n = to - from;
    if (first) {
      std::fill(sums.top, sums.top + t.w.n_pools, -infinity);
      std::fill(sums.sum, part + GatedPart<Acc>::size(t.in), Acc(0));
    }
    for (int64_t k = 0; k < t.w.n_pools; ++k) {
      const Acc* logits = t.logits + k * t.ld_logits + from;
      Acc *z = sums.z + k * t.in.dim, top = sums.top[k];
      for (int64_t i = 0; i < n; ++i) top = std::max(top, logits[i]);
      // where nothing is included so far, subtract 0 and not -inf
      const Acc shift = top == -infinity ? Acc(0) : top;
      exp_row(logits, shift, n, weights);
      const Acc factor = sums.top[k] == -infinity ? Acc(0) : std::exp(sums.top[k] - shift);
      sums.top[k] = top;
      double total = 0;  // the rounding of one long sum would stand in every weight
      for (int64_t i = 0; i < n; ++i) total += weights[i];
      sums.sum[k] = sums.sum[k] * factor + static_cast<Acc>(total);
      t.drop(k, from, to, weights);
      for (int64_t d = 0; factor != 1 && d < t.in.dim; ++d) z[d] *= factor;
      t.add_rows(weights, from, to, z);
    }
  }

  // To the results if the chunk holds the whole bag, else to the slot.
  void hand_over(const GatedForward& p, const PackedRows& all, const GatedChunk& chunk, int64_t bag,
                 char* slot) {
    const GatedPart<Acc> sums(part, t.in);
    const bool begins = all.first[bag] >= chunk.begin, ends = all.first[bag + 1] <= chunk.end;
    if (begins && ends) return write_gated_result(p, bag, sums);
    Acc* to = reinterpret_cast<Acc*>(slot) + (begins ? GatedPart<Acc>::size(t.in) : 0);
    std::memcpy(to, part, GatedPart<Acc>::size(t.in) * sizeof(Acc));
  }
};

}  // namespace
}  // namespace survfuse
