// Backward of gated attention pooling over one chunk of packed rows; the hidden layer is computed
// again.
#pragma once

#include "cpu/gated_attention_pool_tile.h"

namespace survfuse {
namespace {

template <class P, class Acc>
struct GatedBackwardKernel {
  using Element = typename P::Element;
  using Tile = GatedTile<P, Acc>;
  using Weights = GatedWeights<P, Acc>;

  Tile t;
  int64_t ld_turned;
  Acc *weights, *d_logits;       // [K, n]; d_logits instead of the logits
  Element *d_hidden, *d_turned;  // [n, 2 Lp], and turned
  Element *panel, *room;         // of the tile's rows; for the turning
  const Element **hidden_rows, **turned_rows;
  Acc* d_rows;          // [n, Dp]
  GatedSlot<Acc> sums;  // of a few rows; no weights

  GatedBackwardKernel(const GatedParams& in, const Weights& w) : t(in, w), sums(nullptr, 0, 0) {
    // one cache line more, or the rows' starts would share a few sets of the cache
    ld_turned = round_up(t.height, 32) + 64 / static_cast<int64_t>(sizeof(Element));
  }

  int64_t lay_out(Arena arena) {
    t.lay_out(arena);
    weights = arena.take<Acc>(t.w.n_pools * t.ld_logits);
    d_logits = t.logits;
    d_hidden = arena.take<Element>(t.height * t.w.columns);
    d_turned = arena.take<Element>(t.w.columns * ld_turned);
    panel = arena.take<Element>(round_up(t.height, 2) * P::kWidth);
    room = arena.take<Element>(P::turning_room(t.w.columns));
    hidden_rows = arena.take<const Element*>(t.height);
    turned_rows = arena.take<const Element*>(t.w.columns);
    d_rows = arena.take<Acc>(t.height * Tile::padded_dim(t.in));
    sums = GatedSlot<Acc>(arena.take<Acc>((2 + t.w.n_pools) * t.w.hidden), t.w.columns, 0);
    return arena.used;
  }

  static void run(const GatedBackward& p, const PackedRows& all, const GatedChunk& chunk,
                  char* packed, char* scratch, char* slot_memory) {
    Weights w(p.in);
    w.lay_out(Arena{packed});
    GatedBackwardKernel kernel(p.in, w);
    kernel.lay_out(Arena{scratch});
    Tile& t = kernel.t;
    const int64_t padded = Tile::padded_dim(p.in);
    const GatedSlot<Acc> slot(slot_memory, w.columns, padded);
    if (chunk.fresh) slot.clear_sums(w.columns, w.n_pools);
    const bool weights = p.d_w_tanh || p.d_w_gate;
    const bool hidden = weights || p.d_b_tanh || p.d_b_gate || p.d_bag;
    for (int64_t begin = chunk.begin; begin < chunk.end; begin += t.n) {
      t.read(all, begin, chunk.end);
      t.template score<true>();
      for (int64_t i = 0, end; i < t.n; i = end) {
        end = t.run_end(i);
        kernel.differentiate_logits(p, i, end);
      }
      if (p.d_bias) kernel.add_bias(p);
      kernel.differentiate_layer(slot, hidden);
      if (weights) kernel.add_weights(slot, chunk.fresh && begin == chunk.begin);
      if (p.d_bag) kernel.add_bag(p);
    }
  }

 private:
  // Logits of rows [from, to), of one bag, become their gradients.
  void differentiate_logits(const GatedBackward& p, int64_t from, int64_t to) {
    const Acc infinity = static_cast<Acc>(INFINITY);
    const int64_t n = to - from;
    for (int64_t k = 0; k < t.w.n_pools; ++k) {
      const int64_t at = t.bags[from] * t.w.n_pools + k;
      Acc *d_logit = d_logits + k * t.ld_logits + from, *weight = weights + k * t.ld_logits + from;
      const Acc lse = static_cast<const Acc*>(p.lse)[at];
      if (lse == -infinity) {
        std::fill(weight, weight + n, Acc(0));
        std::fill(d_logit, d_logit + n, Acc(0));
        continue;
      }
      exp_row(d_logit, lse, n, d_logit);
      std::memcpy(weight, d_logit, n * sizeof(Acc));
      t.drop(k, from, to, weight);
      const Acc delta = static_cast<const Acc*>(p.delta)[at];
      const Acc* d_pooled = static_cast<const Acc*>(p.d_pooled) + at * t.in.dim;
      for (int64_t i = 0; i < n; ++i) {
        // an excluded row has no gradient, even where that of a result is infinite
        if (t.excluded(from + i))
          weight[i] = d_logit[i] = 0;
        else
          d_logit[i] = weight[i] * t.dot(d_pooled, from + i) - d_logit[i] * delta;
      }
    }
  }

  void add_bias(const GatedBackward& p) {
    for (int64_t i = 0; i < t.n; ++i) {
      Acc total = 0;
      for (int64_t k = 0; k < t.w.n_pools; ++k) total += d_logits[k * t.ld_logits + i];
      Acc& out = static_cast<Acc*>(p.d_bias)[t.stored[i]];
      out = p.overlapping ? out + total : total;
    }
  }

  // The gradients in front of tanh and the sigmoid, rounded as they are multiplied; those of
  // w_score and of the biases are complete with that.
  void differentiate_layer(const GatedSlot<Acc>& slot, bool hidden) {
    // sums of sums: one long sum would round more
    constexpr int kRows = 4, kGroup = 32;
    const int64_t n_sums = (2 + t.w.n_pools) * t.w.hidden;
    for (int64_t group = 0; group < t.n; group += kGroup) {
      std::fill(sums.d_biases, sums.d_biases + n_sums, Acc(0));
      const int64_t end = std::min(t.n, group + kGroup);
      for (int64_t i = group; i < end; i += kRows)
        with_constant<kRows>(static_cast<int>(std::min<int64_t>(kRows, end - i)),
                             [&](auto rows) { differentiate_rows<rows()>(hidden, i); });
      for (int64_t l = 0; l < n_sums; l += kLanes<Acc>)
        add_to(slot.d_biases + l, load(sums.d_biases + l));
    }
  }

  template <int ROWS>
  void differentiate_rows(bool hidden, int64_t i) {
    const int64_t n_hidden = t.w.hidden;
    for (int64_t l = 0; l < n_hidden; l += kLanes<Acc>) {
      Vec<Acc> a[ROWS], b[ROWS], rest[ROWS], d_gated[ROWS] = {};
      for (int r = 0; r < ROWS; ++r) {
        a[r] = load(t.layer + (i + r) * t.ld_hidden + l);
        const Vec<Acc> code = load(t.layer + (i + r) * t.ld_hidden + n_hidden + l);
        b[r] = P::share(code);
        rest[r] = P::rest(code);
      }
      for (int64_t k = 0; k < t.w.n_pools; ++k) {
        const Vec<Acc> score = load(t.w.w_score + k * n_hidden + l);
        Vec<Acc> d_score{};
        for (int r = 0; r < ROWS; ++r) {
          const Vec<Acc> d_logit = splat(d_logits[k * t.ld_logits + i + r]);
          d_score += d_logit * (a[r] * b[r]);
          d_gated[r] += d_logit * score;
        }
        add_to(sums.d_score + k * n_hidden + l, d_score);
      }
      if (!hidden) continue;
      Vec<Acc> d_tanh{}, d_gate{};
      for (int r = 0; r < ROWS; ++r) {
        const Vec<Acc> d_value = d_gated[r] * b[r] * (Acc(1) - a[r] * a[r]);
        const Vec<Acc> d_share = d_gated[r] * a[r] * b[r] * rest[r];
        d_tanh += d_value;
        d_gate += d_share;
        Element* out = d_hidden + (i + r) * t.w.columns + l;
        P::narrow(d_value, out);
        P::narrow(d_share, out + n_hidden);
      }
      add_to(sums.d_biases + l, d_tanh);
      add_to(sums.d_biases + n_hidden + l, d_gate);
    }
  }

  static void add_to(Acc* sums, Vec<Acc> part) { store(sums, load(sums) + part); }

  void add_weights(const GatedSlot<Acc>& slot, bool fresh) {
    const int64_t columns = t.w.columns, n_k = round_up(t.n, P::kPairs);
    if (n_k > t.n) std::memset(d_hidden + t.n * columns, 0, columns * sizeof(Element));
    P::turn_rows(d_hidden, columns, n_k, columns, d_turned, ld_turned, room);
    for (int64_t l = 0; l < columns; ++l) turned_rows[l] = d_turned + l * ld_turned;
    const int64_t padded = Tile::padded_dim(t.in);
    for (int64_t d = 0; d < t.in.dim; d += P::kWidth) {
      P::pack(t.rows, n_k, d, std::min(P::kWidth, t.in.dim - d), panel);
      Acc* c = slot.d_weights + d;
      if (fresh)
        multiply_panels<P, true>(turned_rows, columns, n_k, panel, 0, 1, c, padded);
      else
        multiply_panels<P, false>(turned_rows, columns, n_k, panel, 0, 1, c, padded);
    }
  }

  void add_bag(const GatedBackward& p) {
    const int64_t padded = Tile::padded_dim(t.in);
    for (int64_t i = 0; i < t.n; ++i) hidden_rows[i] = d_hidden + i * t.w.columns;
    multiply_panels<P, true>(hidden_rows, t.n, t.w.columns, t.w.back_panels, t.w.back_panel_size,
                             t.w.n_back_panels, d_rows, padded);
    for (int64_t i = 0; i < t.n; ++i) {
      Acc* row = d_rows + i * padded;
      for (int64_t k = 0; k < t.w.n_pools; ++k) {
        const Acc weight = weights[k * t.ld_logits + i];
        const Acc* d_pooled =
            static_cast<const Acc*>(p.d_pooled) + (t.bags[i] * t.w.n_pools + k) * t.in.dim;
        for (int64_t d = 0; weight != 0 && d < t.in.dim; ++d) row[d] += weight * d_pooled[d];
      }
      if (t.excluded(i)) std::memset(row, 0, t.in.dim * sizeof(Acc));
      write_row(row, t.in.dim, p.overlapping, p.d_bag_type, p.d_bag, t.stored[i] * t.in.dim);
    }
  }
};

}  // namespace
}  // namespace survfuse
