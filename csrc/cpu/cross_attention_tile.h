// The two sides of one work item, as the products of cross_attention take them.
#pragma once

#include "cpu/cross_attention_plan.h"
#include "cpu/panels.h"
#include "cpu/pool_bag_tile.h"
#include "cpu/softmax.h"

namespace survfuse {
namespace {

constexpr int64_t kTurnedColumns = 128;  // tiles this narrow are turned before they are scored
constexpr int64_t kLineRows = 512;       // of a bag whose logits are held together
constexpr int64_t kPaneledRows = 32;     // so many short rows repay packing a tile into panels
constexpr int64_t kPaneledTileRows = 128;
constexpr int64_t kMostScoreBytes = 4 << 20;
constexpr int64_t kScoreBytes = 256 * 1024;  // logits of a tile; their gradients take as much again

inline int64_t element_bytes(ElementType type) {
  return type == ElementType::kFloat64 ? 8 : type == ElementType::kFloat32 ? 4 : 2;
}

// Rows of one head, as TileReader describes a bag.
inline PoolBagParams head_view(const HeadRows& rows, int64_t head, int64_t dim, const void* bias,
                               int64_t n_short) {
  PoolBagParams view{};
  view.bag =
      static_cast<const char*>(rows.data) + head * rows.head_stride * element_bytes(rows.type);
  view.bag_type = rows.type;
  view.bag_stride = rows.row_stride;
  view.dim = dim;
  view.bias = bias;
  view.n_rows = n_short;
  return view;
}

template <class P, class Acc>
struct CrossAttentionTile {
  using Element = typename P::Element;
  using Weight = typename P::Weight;
  using Panels = typename PanelsOf<P>::type;
  static constexpr int64_t kWidth = Panels::kWidth;

  // The short rows of one head: as they lie, and their whole panels.
  struct Short {
    const Element *rows, *panels;
    int64_t width;
  };

  // the products take logits and gradients as they are
  static constexpr bool kDirect = std::is_same_v<Weight, Acc>;

  const CrossAttentionParams& in;
  bool few, shared;
  bool paneled;                     // the short side is long enough for products by panels
  int64_t n_short, dim, value_dim;  // padded to whole vectors
  int64_t height;                   // rows of a tile
  int64_t ld_scores, ld_weights;    // columns of scores and grads, and of weights
  int64_t padded_short;             // short rows, in whole groups of P::kPairs

  // short1, short2: [H, padded_short, dim or value_dim]; few queries: query and gradient of out;
  // few keys: key and value. The long side: key and value, or query and gradient of out.
  Element *short1, *short2, *buffer1, *buffer2;
  Acc *line, *rstd, *scores, *grads, *row1, *row2;  // row1, row2: [height, dim or value_dim]
  Acc *top, *sum, *mean;                            // [height]
  Acc *kept, *d_bias;                               // [kLineRows]
  Weight *weights, *turned;                         // [R, height] and [height, R]
  int64_t ld_turned;
  Element* columns;               // [kTurnedColumns, height]
  Element *panels1, *panels2;     // of short1 and short2
  Element *panel, *room;          // one of the tile; for the turning
  const Element **left, **right;  // rows of a product

  // short_max: of the largest bag; it decides the height, so that one scratch serves all
  CrossAttentionTile(const CrossAttentionParams& params, int64_t n_short_rows, int64_t short_max)
      : in(params),
        few(params.few_queries),
        shared(!params.few_queries && params.query.head_stride == 0),
        paneled(n_short_rows >= kPaneledRows),
        n_short(n_short_rows),
        dim(round_up(params.dim, P::kAlign)),
        value_dim(round_up(params.value_dim, P::kAlign)),
        padded_short(round_up(n_short_rows, P::kPairs)) {
    const PoolBagParams wide = head_view(params.key, 0, std::max(dim, value_dim), nullptr, 1);
    const int64_t tile_rows =
        short_max < kPaneledRows ? TileReader<P, Acc>(wide).tile_rows : kPaneledTileRows;
    // whole tiles are worth scores that leave the nearest cache, up to a point
    const int64_t score_bytes = std::max<int64_t>(1, short_max) * sizeof(Acc);
    const int64_t fit =
        std::max(kScoreBytes / score_bytes, std::min(tile_rows, kMostScoreBytes / score_bytes));
    height = std::min(tile_rows, std::max<int64_t>(8, fit / 8 * 8));
    ld_scores = ld_weights = round_up(height, std::max<int64_t>(kLanes<Acc>, P::kPairs));
  }

  // Whether all logits of a bag of this length fit the memory of a tile's.
  bool holds(int64_t length) const {
    return length <= kLineRows && padded_short * round_up(length, kLanes<Acc>) <= score_room();
  }

  int64_t score_room() const {
    return std::max(padded_short * ld_weights, kScoreBytes / static_cast<int64_t>(sizeof(Acc)));
  }

  int64_t lay_out(Arena arena) {
    const int64_t rows = in.n_heads * padded_short,
                  pad = 64 / static_cast<int64_t>(sizeof(Element));
    short1 = arena.take<Element>(rows * dim);
    short2 = arena.take<Element>(rows * value_dim);
    buffer1 = arena.take<Element>(ld_scores * (dim + pad));
    buffer2 = arena.take<Element>(ld_scores * (value_dim + pad));
    line = arena.take<Acc>(std::max(dim, value_dim));
    rstd = arena.take<Acc>(ld_scores);
    scores = arena.take<Acc>(score_room());
    grads = arena.take<Acc>(score_room());
    row1 = arena.take<Acc>(ld_scores * dim);
    row2 = arena.take<Acc>(ld_scores * value_dim);
    top = arena.take<Acc>(ld_scores);
    sum = arena.take<Acc>(ld_scores);
    mean = arena.take<Acc>(ld_scores);
    kept = arena.take<Acc>(std::max(ld_scores, kLineRows));
    d_bias = arena.take<Acc>(std::max(ld_scores, kLineRows));
    weights = arena.take<Weight>(kDirect ? 0 : padded_short * ld_weights);
    // one cache line more, or the rows' starts would share a few sets of the cache
    ld_turned = paneled ? round_up(padded_short, 32) + pad : padded_short;
    turned = arena.take<Weight>(kDirect && !paneled ? 0 : ld_weights * ld_turned);
    columns = arena.take<Element>(kTurnedColumns * ld_weights);
    if (!paneled) return arena.used;
    panels1 = arena.take<Element>(rows * dim);
    panels2 = arena.take<Element>(rows * value_dim);
    panel = arena.take<Element>(std::max({dim, value_dim, ld_scores}) * kWidth);
    room = arena.take<Element>(Panels::turning_room(ld_weights));
    left = arena.take<const Element*>(std::max(padded_short, ld_scores));
    right = arena.take<const Element*>(ld_scores);
    return arena.used;
  }

  // The short rows of one kind, converted, those behind the last zero. bias: excluded rows are
  // zero.
  void load_short(const HeadRows& rows, int64_t start, int64_t width, int64_t padded_width,
                  bool with_bias, Element* out) {
    const Acc* bias =
        with_bias && in.bias_head_stride == 0 ? static_cast<const Acc*>(in.bias) : nullptr;
    std::memset(out, 0, in.n_heads * padded_short * padded_width * sizeof(Element));
    for (int64_t h = 0; h < in.n_heads; ++h) {
      const PoolBagParams view = head_view(rows, h, width, bias, n_short);
      const TileReader<P, Acc> reader(view);
      for (int64_t r = 0; r < n_short; ++r) {
        if (excludes(bias, start + r)) continue;
        reader.convert(start + r, line);
        P::elements(line, Acc(1), out + (h * padded_short + r) * padded_width, padded_width);
      }
    }
  }

  // n rows of the long side from `row` on, in place where they can be used as they lie.
  void read_long(const HeadRows& rows, int64_t head, int64_t width, bool with_bias, bool normalize,
                 int64_t row, int64_t n, Element* buffer, const Element** x, int64_t* ldx) {
    const bool per_key = with_bias && in.bias_head_stride == 0;
    PoolBagParams view =
        head_view(rows, head, width, per_key ? in.bias : nullptr, paneled ? 1 : n_short);
    if (normalize) {
      view.normalize = in.normalize;
      view.eps = in.eps;
      view.mean = in.mean;
      view.rstd = in.rstd;
    }
    TileReader<P, Acc>(view).read(row, n, buffer, line, normalize ? rstd : nullptr, x, ldx);
  }

  // Whether rows of results can be written by whole registers.
  static bool writes_rows(ElementType type, int64_t width, int64_t padded) {
    return width == padded &&
           type == (sizeof(Acc) == 8 ? ElementType::kFloat64 : ElementType::kFloat32);
  }

  Acc bias_of(int64_t key, int64_t head) const {
    return static_cast<const Acc*>(in.bias)[key * in.bias_row_stride + head * in.bias_head_stride];
  }

  // Long keys, whose bias is one number each: products to logits; an excluded key is -inf.
  void finish_logits(Acc* scores, int64_t key, int64_t n) const {
    const Acc scale = static_cast<Acc>(in.scale);
    const Acc* bias = static_cast<const Acc*>(in.bias);
    if (bias)
      for (int64_t i = 0; i < n; ++i) scores[i] = scores[i] * scale + bias[key + i];
    else
      for (int64_t i = 0; i < n; ++i) scores[i] *= scale;
  }

  bool excluded(int64_t key) const { return excludes(static_cast<const Acc*>(in.bias), key); }

  Short short_rows(int which, int64_t head) const {
    const int64_t width = which == 1 ? dim : value_dim, at = head * padded_short * width;
    return {(which == 1 ? short1 : short2) + at, (which == 1 ? panels1 : panels2) + at, width};
  }

  // Short rows that will be scattered.
  void pack_short(int which) {
    if (!paneled) return;
    for (int64_t h = 0; h < in.n_heads; ++h) {
      const Short from = short_rows(which, h);
      Element* to = (which == 1 ? panels1 : panels2) + h * padded_short * from.width;
      point(from.rows, from.width, padded_short, left);
      for (int64_t d = 0; d + kWidth <= from.width; d += kWidth)
        Panels::pack(left, padded_short, d, kWidth, to + d * padded_short);
    }
  }

  // out [R, n] = a [R, width] . x [n, width]. streamed: x comes from memory, not from a buffer.
  void score(const Element* a, int64_t width, const Element* x, int64_t ldx, int64_t n, Acc* out,
             bool streamed) {
    if (paneled) {
      point(a, width, n_short, left);
      for (; n >= kWidth; n -= kWidth, x += kWidth * ldx, out += kWidth) {
        Panels::pack_columns(x, ldx, width, panel);
        multiply_panels<Panels, true>(left, n_short, width, panel, 0, 1, out, ld_scores);
      }
      if (n == 0) return;
    }
    if constexpr (std::is_same_v<Element, float>) {
      // over few columns the sums across a register would take as long as the products
      // whole registers are written: a tile may not reach into the next row of a wider matrix
      if (n_short >= 16 && width <= kTurnedColumns && height % kLanes<Acc> == 0) {
        transpose(x, ldx, n, width, columns, ld_weights);
        accumulate<P, true>(a, width, n_short, columns, ld_weights, width, round_up(n, kLanes<Acc>),
                            out, ld_scores);
        return;
      }
    }
    dots<P>(a, width, n_short, x, ldx, n, width, out, ld_scores, streamed);
  }

  // c [R, width] += m [R, n] . x [n, width], m rounded to the type of the products.
  void gather(const Acc* m, int64_t n, const Element* x, int64_t ldx, int64_t width, Acc* c,
              int64_t ldc) {
    const Weight* w = rounded(m, n);
    const int64_t ldw = kDirect ? ld_scores : ld_weights, n_k = round_up(n, P::kPairs);
    // an odd row stands alone: behind it may be no memory
    if (paneled && n == n_k) {
      point(w, ldw, n_short, left);
      point(x, ldx, n, right);
      for (; width >= kWidth; width -= kWidth, x += kWidth, c += kWidth) {
        Panels::pack(right, n, x - right[0], kWidth, panel);
        multiply_panels<Panels, false>(left, n_short, n, panel, 0, 1, c, ldc);
      }
    }
    accumulate<P>(w, ldw, n_short, x, ldx, n_k, width, c, ldc);
  }

  // c [n, width] = m^T [n, R] . a [R, width], or += unless FRESH.
  template <bool FRESH>
  void scatter(const Acc* m, int64_t n, const Short& a, Acc* c, int64_t ldc) {
    const Element* rows = a.rows;
    int64_t width = a.width;
    if (!paneled && kDirect) {
      if constexpr (kDirect)
        accumulate<P, FRESH>(m, 1, n, rows, width, n_short, width, c, ldc, {}, ld_scores);
      return;
    }
    if (paneled) {
      const Weight* w = rounded(m, n);
      Panels::turn_rows(w, kDirect ? ld_scores : ld_weights, padded_short, round_up(n, 8), turned,
                        ld_turned, room);
      point(turned, ld_turned, n, left);
      const int64_t n_panels = width / kWidth;
      multiply_panels<Panels, FRESH>(left, n, padded_short, a.panels, padded_short * kWidth,
                                     n_panels, c, ldc);
      rows += n_panels * kWidth;
      c += n_panels * kWidth;
      width -= n_panels * kWidth;
    } else {
      for (int64_t r = 0; r < padded_short; ++r)
        for (int64_t i = 0; i < n; ++i)
          turned[i * ld_turned + r] = r < n_short ? P::weight(m[r * ld_scores + i]) : Weight(0);
    }
    accumulate<P, FRESH>(turned, ld_turned, n, rows, a.width, padded_short, width, c, ldc);
  }

 private:
  static void point(const Element* first, int64_t ld, int64_t n, const Element** rows) {
    for (int64_t i = 0; i < n; ++i) rows[i] = first + i * ld;
  }

  // m [R, n] as it is multiplied: zeros behind it up to whole pairs of columns, and of rows.
  const Weight* rounded(const Acc* m, int64_t n) {
    if constexpr (kDirect) {
      return m;
    } else {
      for (int64_t r = 0; r < padded_short; ++r) {
        Weight* out = weights + r * ld_weights;
        int64_t i = 0;
        for (; r < n_short && i < n; i += kLanes<Acc>)
          Panels::narrow(load(m + r * ld_scores + i), out + i);
        std::fill(out + std::min(i, n), out + ld_weights, Weight(0));
      }
      return weights;
    }
  }
};

}  // namespace
}  // namespace survfuse
