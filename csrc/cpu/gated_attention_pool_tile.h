// A tile of rows of a bag, and their hidden layer: what both directions of gated attention share.
#pragma once

#include "cpu/gated_attention_pool_plan.h"
#include "cpu/gradients.h"
#include "cpu/panels.h"
#include "cpu/softmax.h"

namespace survfuse {
namespace {

// The parameters as they are multiplied; hidden units are padded by ones that do nothing.
template <class P, class Acc>
struct GatedWeights {
  using Element = typename P::Element;

  int64_t dim, padded_dim;                 // padded for products over it
  int64_t hidden, columns;                 // Lp, and both branches: tanh, then the sigmoid
  int64_t n_panels, panel_size;            // of the forward: panels of hidden units
  int64_t n_back_panels, back_panel_size;  // of d_bag: panels of features
  int64_t n_pools;
  Element *matrix, *panels, *back_panels;
  Acc *b_tanh, *b_gate;  // [Lp]
  Acc* w_score;          // [K, Lp]

  explicit GatedWeights(const GatedParams& in)
      : dim(in.dim),
        padded_dim(round_up(in.dim, kPanelAlign)),
        hidden(round_up(in.n_hidden, 16)),
        columns(2 * hidden),
        n_panels(round_up(columns, P::kWidth) / P::kWidth),
        panel_size(padded_dim * P::kWidth),
        n_back_panels(round_up(dim, P::kWidth) / P::kWidth),
        back_panel_size(columns * P::kWidth),
        n_pools(in.n_pools) {}

  int64_t lay_out(Arena arena) {
    matrix = arena.take<Element>(n_panels * P::kWidth * padded_dim);
    panels = arena.take<Element>(n_panels * panel_size);
    back_panels = arena.take<Element>(n_back_panels * back_panel_size);
    b_tanh = arena.take<Acc>(hidden);
    b_gate = arena.take<Acc>(hidden);
    w_score = arena.take<Acc>(n_pools * hidden);
    return arena.used;
  }

  void pack(const GatedParams& in, bool d_bag) {
    std::memset(matrix, 0, n_panels * P::kWidth * padded_dim * sizeof(Element));
    for (int branch = 0; branch < 2; ++branch) {
      const Acc* w = static_cast<const Acc*>(branch ? in.w_gate : in.w_tanh);
      for (int64_t l = 0; l < in.n_hidden; ++l)
        for (int64_t d = 0; d < dim; ++d)
          matrix[(branch * hidden + l) * padded_dim + d] = P::element(w[l * dim + d]);
    }
    for (int64_t panel = 0; panel < n_panels; ++panel)
      P::pack_columns(matrix + panel * P::kWidth * padded_dim, padded_dim, padded_dim,
                      panels + panel * panel_size);
    std::vector<const Element*> rows(columns);
    for (int64_t l = 0; l < columns; ++l) rows[l] = matrix + l * padded_dim;
    for (int64_t panel = 0; d_bag && panel < n_back_panels; ++panel)
      P::pack(rows.data(), columns, panel * P::kWidth, std::min(P::kWidth, dim - panel * P::kWidth),
              back_panels + panel * back_panel_size);
    padded(in.b_tanh, in.n_hidden, b_tanh);
    padded(in.b_gate, in.n_hidden, b_gate);
    for (int64_t k = 0; k < n_pools; ++k)
      padded(static_cast<const Acc*>(in.w_score) + k * in.n_hidden, in.n_hidden,
             w_score + k * hidden);
  }

 private:
  void padded(const void* from, int64_t n, Acc* to) const {
    for (int64_t i = 0; i < hidden; ++i)
      to[i] = from && i < n ? static_cast<const Acc*>(from)[i] : Acc(0);
  }
};

constexpr int64_t kGatedTileBytes = 1 << 20;  // of rows, which are read two or three times
constexpr int64_t kGatedTileRows = 504;
constexpr int64_t kScoredRows = 252;  // whose hidden layer is computed together

template <class P, class Acc>
struct GatedTile {
  using Element = typename P::Element;
  using Weights = GatedWeights<P, Acc>;

  const GatedParams& in;
  const Weights& w;
  int64_t height, ld_logits, ld_hidden;
  int64_t n;  // rows of this tile
  const Element** rows;
  Element *copies, *zeros;
  int64_t *stored, *bags, *positions;  // [n] row of the bag's matrix, bag, and row within the bag
  Acc* layer;                          // [n, 2 Lp] the hidden layer
  Acc* line;                           // one row of values
  Acc* logits;                         // [K, n]

  GatedTile(const GatedParams& params, const Weights& weights)
      : in(params),
        w(weights),
        ld_hidden(w.n_panels * P::kWidth + 64 / static_cast<int64_t>(sizeof(Acc))) {
    const int64_t row_bytes = w.padded_dim * static_cast<int64_t>(sizeof(Element));
    height = std::clamp<int64_t>(kGatedTileBytes / row_bytes, 48, kGatedTileRows) / 6 * 6;
    ld_logits = round_up(height, 32);
  }

  // Columns of the gradients of the weights: whole panels of every type.
  static int64_t padded_dim(const GatedParams& in) {
    return round_up(in.dim, P::kWidth) + 64 / static_cast<int64_t>(sizeof(Acc));
  }

  void lay_out(Arena& arena) {
    rows = arena.take<const Element*>(height + 1);
    copies = arena.take<Element>(in_place() ? 0 : height * w.padded_dim);
    zeros = arena.take<Element>(w.padded_dim);
    stored = arena.take<int64_t>(height);
    bags = arena.take<int64_t>(height);
    positions = arena.take<int64_t>(height);
    layer = arena.take<Acc>(height * ld_hidden);
    line = arena.take<Acc>(std::max(w.hidden, w.padded_dim));
    logits = arena.take<Acc>(w.n_pools * ld_logits);
    if (arena.base) std::memset(zeros, 0, w.padded_dim * sizeof(Element));
  }

  // Takes packed rows from `begin` on, to the tile's height or to `end`.
  void read(const PackedRows& all, int64_t begin, int64_t end) {
    n = std::min(height, end - begin);
    int64_t bag =
        std::upper_bound(all.first.begin(), all.first.end(), begin) - all.first.begin() - 1;
    for (int64_t i = 0; i < n; ++i) {
      while (begin + i >= all.first[bag + 1]) ++bag;
      bags[i] = bag;
      positions[i] = begin + i - all.first[bag];
      stored[i] = in.starts[bag] + positions[i];
      rows[i] = excluded(i) ? zeros : row(i);
    }
    rows[n] = zeros;
  }

  bool excluded(int64_t i) const {
    return in.bias && static_cast<const Acc*>(in.bias)[stored[i]] == -static_cast<Acc>(INFINITY);
  }

  // The hidden layer, and the logits. keep: what P::activate makes of it stays in `layer`.
  template <bool KEEP>
  void score() {
    for (int64_t from = 0; from < n; from += kScoredRows)
      score_rows<KEEP>(from, std::min(n, from + kScoredRows));
  }

  template <bool KEEP>
  void score_rows(int64_t from, int64_t to) {
    multiply_panels<P, true>(rows + from, to - from, in.dim, w.panels, w.panel_size, w.n_panels,
                             layer + from * ld_hidden, ld_hidden);
    const Acc* bias = static_cast<const Acc*>(in.bias);
    for (int64_t i = from; i < to; ++i) {
      Acc *value = layer + i * ld_hidden, *share = value + w.hidden;
      for (int64_t l = 0; l < w.hidden; l += kLanes<Acc>) {
        Vec<Acc> a, b;
        P::activate(load(value + l) + load(w.b_tanh + l), load(share + l) + load(w.b_gate + l), &a,
                    &b);
        store(line + l, a * P::share(b));
        if (!KEEP) continue;
        store(value + l, a);
        store(share + l, b);
      }
      for (int64_t k = 0; k < w.n_pools; ++k) {
        const Acc* score = w.w_score + k * w.hidden;
        Vec<Acc> sum[2] = {};
        for (int64_t l = 0; l < w.hidden; l += kLanes<Acc>)
          sum[l / kLanes<Acc> % 2] += load(line + l) * load(score + l);
        Acc logit = horizontal_sum<Acc>(sum[0] + sum[1]);
        if (in.b_score) logit += static_cast<const Acc*>(in.b_score)[k];
        logits[k * ld_logits + i] = bias ? logit + bias[stored[i]] : logit;
      }
    }
  }

  // The first row behind i that is of another bag.
  int64_t run_end(int64_t i) const {
    const int64_t bag = bags[i];
    while (i < n && bags[i] == bag) ++i;
    return i;
  }

  // The weights of rows [from, to) in pool k after dropout, in place.
  void drop(int64_t k, int64_t from, int64_t to, Acc* weights) const {
    if (in.dropout_p > 0)
      Dropout<Acc>(in.seed, in.dropout_p)
          .apply(bags[from], k, 0, positions[from], 1, to - from, weights);
  }

  // z[:D] += sum over rows [from, to) of weights[i - from] * x[i].
  void add_rows(const Acc* weights, int64_t from, int64_t to, Acc* z) const {
    constexpr int kVectors = 4;
    constexpr int64_t kStep = kVectors * kLanes<Acc>;
    int64_t d = 0;
    for (; d + kStep <= in.dim; d += kStep) {
      Vec<Acc> sum[kVectors];
      for (int v = 0; v < kVectors; ++v) sum[v] = load(z + d + v * kLanes<Acc>);
      for (int64_t i = from; i < to; ++i) {
        const Vec<Acc> weight = splat(weights[i - from]);
        for (int v = 0; v < kVectors; ++v)
          sum[v] += weight * P::wide(rows[i] + d + v * kLanes<Acc>);
      }
      for (int v = 0; v < kVectors; ++v) store(z + d + v * kLanes<Acc>, sum[v]);
    }
    for (; d < in.dim; ++d)
      for (int64_t i = from; i < to; ++i) z[d] += weights[i - from] * as_acc<Acc>(rows[i][d]);
  }

  // a[:D] . x[i]
  Acc dot(const Acc* a, int64_t i) const {
    constexpr int kSums = 4;
    constexpr int64_t kStep = kSums * kLanes<Acc>;
    Vec<Acc> sum[kSums] = {};
    int64_t d = 0;
    for (; d + kStep <= in.dim; d += kStep)
      for (int v = 0; v < kSums; ++v)
        sum[v] += load(a + d + v * kLanes<Acc>) * P::wide(rows[i] + d + v * kLanes<Acc>);
    Acc total = horizontal_sum<Acc>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; d < in.dim; ++d) total += a[d] * as_acc<Acc>(rows[i][d]);
    return total;
  }

 private:
  bool in_place() const {
    const ElementType same = sizeof(Element) == 8   ? ElementType::kFloat64
                             : sizeof(Element) == 4 ? ElementType::kFloat32
                                                    : ElementType::kBFloat16;
    return in.bag_type == same && in.dim % P::kPairs == 0;
  }

  const Element* row(int64_t i) {
    const int64_t at = stored[i] * in.bag_stride;
    if (in_place()) return static_cast<const Element*>(in.bag) + at;
    Element* copy = copies + i * w.padded_dim;
    const auto convert = [&](const auto* from, const auto& widen) {
      for (int64_t d = 0; d < in.dim; ++d) copy[d] = P::element(widen(from[at + d]));
    };
    if (in.bag_type == ElementType::kBFloat16)
      convert(static_cast<const uint16_t*>(in.bag), bf16_to_float);
    else
      convert(static_cast<const uint16_t*>(in.bag), half_to_float);
    std::fill(copy + in.dim, copy + w.padded_dim, Element(0));
    return copy;
  }
};

}  // namespace
}  // namespace survfuse
