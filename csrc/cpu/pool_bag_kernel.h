// pool_bag on one contiguous range of a bag, for one instruction set and one type of products.
#pragma once

#include "cpu/gradients.h"
#include "cpu/pool_bag_plan.h"
#include "cpu/pool_bag_tile.h"
#include "cpu/softmax.h"

namespace survfuse {
namespace {

template <class P, class Acc>
struct PoolBagKernel {
  using Element = typename P::Element;
  using Weight = typename P::Weight;

  struct Scratch {
    Acc *line, *scores, *grads, *z, *max, *sum, *weight_sum, *rstd, *d_tile;
    Element *tile, *rows;  // rows: queries, and behind them the output gradients
    Weight *weights, *tile_weights;
  };

  // The forward needs no more than the backward, so one layout serves both.
  static int64_t lay_out(Arena arena, const PoolBagParams& in, Scratch* s) {
    const TileReader<P, Acc> reader(in);
    const int64_t r = in.n_rows, n = reader.tile_rows, dim = reader.dim;
    s->line = arena.take<Acc>(dim);
    s->scores = arena.take<Acc>(r * n);
    s->grads = arena.take<Acc>(r * n);
    s->z = arena.take<Acc>(r * dim);
    s->max = arena.take<Acc>(r);
    s->sum = arena.take<Acc>(r);
    s->weight_sum = arena.take<Acc>(r);
    s->rstd = arena.take<Acc>(n);
    s->d_tile = arena.take<Acc>(n * dim);
    s->tile = arena.take<Element>(n * reader.ld);
    s->rows = arena.take<Element>(2 * r * dim);
    s->weights = arena.take<Weight>(r * n);
    s->tile_weights = arena.take<Weight>(2 * r * n);
    return arena.used;
  }

  static int64_t scratch_bytes(const PoolBagParams& in) {
    Scratch unused;
    return lay_out(Arena{nullptr}, in, &unused);
  }

  static void load_rows(const TileReader<P, Acc>& reader, const void* source, int64_t bag,
                        Element* out) {
    const PoolBagParams& in = reader.in;
    const Acc* from = static_cast<const Acc*>(source) + bag * in.n_rows * in.dim;
    for (int64_t r = 0; r < in.n_rows; ++r)
      for (int64_t d = 0; d < reader.dim; ++d)
        out[r * reader.dim + d] = P::element(d < in.dim ? from[r * in.dim + d] : 0);
  }

  static void drop(const PoolBagParams& in, int64_t bag, int64_t r, int64_t position, int64_t n,
                   Acc* values) {
    Dropout<Acc>(in.seed, in.dropout_p).apply(bag, r, 0, position, 1, n, values);
  }

  // Turns dot products into logits: scale, bias; an excluded row is -inf whatever it held.
  static void finish_logits(const PoolBagParams& in, int64_t row, int64_t n, Acc* scores) {
    const Acc scale = static_cast<Acc>(in.scale);
    const Acc* bias = static_cast<const Acc*>(in.bias);
    for (int64_t i = 0; i < n; ++i) scores[i] = scores[i] * scale + (bias ? bias[row + i] : 0);
  }

  static void forward(const PoolBagForward& p, const WorkItem& item, char* memory, Acc* z_out,
                      Acc* max_out, Acc* sum_out, Acc* weight_sum_out) {
    const PoolBagParams& in = p.in;
    const TileReader<P, Acc> reader(in);
    Scratch s;
    lay_out(Arena{memory}, in, &s);
    const int64_t n_rows = in.n_rows, dim = reader.dim, lds = reader.tile_rows;
    load_rows(reader, in.rows, item.bag, s.rows);
    std::memset(s.z, 0, n_rows * dim * sizeof(Acc));
    for (int64_t r = 0; r < n_rows; ++r) {
      s.max[r] = -static_cast<Acc>(INFINITY);
      s.sum[r] = s.weight_sum[r] = 0;
    }
    for (int64_t done = 0; done < item.length; done += reader.tile_rows) {
      const int64_t n = item.length - done < lds ? item.length - done : lds;
      const int64_t row = item.row + done, position = item.position + done;
      const Element* x;
      int64_t ldx;
      reader.read(row, n, s.tile, s.line, nullptr, &x, &ldx);
      dots<P>(s.rows, dim, n_rows, x, ldx, n, dim, s.scores, lds, x != s.tile);
      for (int64_t r = 0; r < n_rows; ++r) {
        Acc* scores = s.scores + r * lds;
        finish_logits(in, row, n, scores);
        weigh(in, item.bag, r, position, n, dim, s, scores);
        Weight* weights = s.weights + r * lds;
        for (int64_t i = 0; i < n; ++i) weights[i] = P::weight(scores[i]);
        for (int64_t i = n; i < round_up(n, P::kPairs); ++i) weights[i] = 0;
      }
      accumulate<P>(s.weights, lds, n_rows, x, ldx, round_up(n, P::kPairs), dim, s.z, dim,
                    reader.ahead(row + n, item.length - done - n));
    }
    for (int64_t r = 0; r < n_rows; ++r) {
      std::memcpy(z_out + r * in.dim, s.z + r * dim, in.dim * sizeof(Acc));
      max_out[r] = s.max[r];
      sum_out[r] = s.sum[r];
      weight_sum_out[r] = s.weight_sum[r];
    }
  }

  // One row's softmax step: scores become the weights of this tile, the running state moves on.
  static void weigh(const PoolBagParams& in, int64_t bag, int64_t r, int64_t position, int64_t n,
                    int64_t dim, Scratch& s, Acc* scores) {
    const Acc top = row_max(scores, n, s.max[r]);
    if (top > s.max[r]) {
      if (s.sum[r] != 0) {
        const Acc factor = std::exp(s.max[r] - top);
        s.sum[r] *= factor;
        s.weight_sum[r] *= factor;
        Acc* z = s.z + r * dim;
        for (int64_t d = 0; d < dim; ++d) z[d] *= factor;
      }
      s.max[r] = top;
    }
    if (top == -static_cast<Acc>(INFINITY)) {
      // nothing included so far; a NaN logit is no -inf and goes on as NaN
      for (int64_t i = 0; i < n; ++i) scores[i] = scores[i] == scores[i] ? 0 : scores[i];
    } else {
      exp_row(scores, top, n, scores);
    }
    const Acc sum = row_sum(scores, n);
    Acc weight_sum = sum;
    if (in.dropout_p > 0) {
      drop(in, bag, r, position, n, scores);
      weight_sum = row_sum(scores, n);
    }
    s.sum[r] += sum;
    s.weight_sum[r] += weight_sum;
  }

  static void backward(const PoolBagBackward& p, const WorkItem& item, char* memory, Acc* d_rows,
                       Acc* d_logit_sum) {
    const PoolBagParams& in = p.in;
    const TileReader<P, Acc> reader(in);
    Scratch s;
    lay_out(Arena{memory}, in, &s);
    const int64_t n_rows = in.n_rows, dim = reader.dim, lds = reader.tile_rows;
    Element* d_pooled = s.rows + n_rows * dim;
    std::memset(s.sum, 0, n_rows * sizeof(Acc));
    load_rows(reader, in.rows, item.bag, s.rows);
    load_rows(reader, p.d_pooled, item.bag, d_pooled);
    std::memset(s.z, 0, n_rows * dim * sizeof(Acc));
    for (int64_t done = 0; done < item.length; done += reader.tile_rows) {
      const int64_t n = item.length - done < lds ? item.length - done : lds;
      const int64_t row = item.row + done, position = item.position + done;
      const Element* x;
      int64_t ldx;
      reader.read(row, n, s.tile, s.line, s.rstd, &x, &ldx);
      dots<P>(s.rows, dim, n_rows, x, ldx, n, dim, s.scores, lds, x != s.tile);
      dots<P>(d_pooled, dim, n_rows, x, ldx, n, dim, s.grads, lds);
      for (int64_t r = 0; r < n_rows; ++r) score_gradient(p, item.bag, r, row, position, n, lds, s);
      for (int64_t r = 0; r < n_rows; ++r) s.sum[r] += row_sum(s.grads + r * lds, n);
      if (p.d_bias) add_bias_gradient(p, row, n, lds, s);
      if (p.d_rows) {
        scale_weights(in, n, lds, s.grads, s.weights);
        accumulate<P>(s.weights, lds, n_rows, x, ldx, round_up(n, P::kPairs), dim, s.z, dim,
                      reader.ahead(row + n, item.length - done - n));
      }
      if (p.d_bag) add_bag_gradient(p, reader, row, n, x, ldx, s);
    }
    std::memcpy(d_logit_sum, s.sum, n_rows * sizeof(Acc));
    if (!p.d_rows) return;
    for (int64_t r = 0; r < n_rows; ++r)
      std::memcpy(d_rows + r * in.dim, s.z + r * dim, in.dim * sizeof(Acc));
  }

  // From logits and d_pooled . x: grads become dS, scores the weights after dropout.
  static void score_gradient(const PoolBagBackward& p, int64_t bag, int64_t r, int64_t row,
                             int64_t position, int64_t n, int64_t lds, Scratch& s) {
    const PoolBagParams& in = p.in;
    Acc* scores = s.scores + r * lds;
    Acc* grads = s.grads + r * lds;
    const int64_t at = bag * in.n_rows + r;
    const Acc lse = static_cast<const Acc*>(p.lse)[at];
    const Acc delta = static_cast<const Acc*>(p.delta)[at];
    const Acc d_weight_sum = static_cast<const Acc*>(p.d_weight_sum)[at];
    finish_logits(in, row, n, scores);
    if (lse == -static_cast<Acc>(INFINITY)) {
      std::memset(scores, 0, n * sizeof(Acc));
      std::memset(grads, 0, n * sizeof(Acc));
      return;
    }
    exp_row(scores, lse, n, scores);
    if (in.dropout_p > 0) {
      Acc kept[kMaxTileRows];
      std::memcpy(kept, scores, n * sizeof(Acc));
      drop(in, bag, r, position, n, kept);
      for (int64_t i = 0; i < n; ++i)
        grads[i] = kept[i] * (grads[i] + d_weight_sum) - scores[i] * delta;
      std::memcpy(scores, kept, n * sizeof(Acc));
    } else {
      for (int64_t i = 0; i < n; ++i) grads[i] = scores[i] * (grads[i] + d_weight_sum - delta);
    }
    // an excluded row has weight 0 and no gradient, even where a gradient is infinite
    const Acc* bias = static_cast<const Acc*>(in.bias);
    for (int64_t i = 0; bias && i < n; ++i)
      if (excludes(bias, row + i)) scores[i] = grads[i] = 0;
  }

  static void scale_weights(const PoolBagParams& in, int64_t n, int64_t lds, const Acc* grads,
                            Weight* out) {
    const Acc scale = static_cast<Acc>(in.scale);
    for (int64_t r = 0; r < in.n_rows; ++r) {
      for (int64_t i = 0; i < n; ++i) out[r * lds + i] = P::weight(grads[r * lds + i] * scale);
      for (int64_t i = n; i < round_up(n, P::kPairs); ++i) out[r * lds + i] = 0;
    }
  }

  static void add_bias_gradient(const PoolBagBackward& p, int64_t row, int64_t n, int64_t lds,
                                const Scratch& s) {
    Acc* d_bias = static_cast<Acc*>(p.d_bias) + row;
    Acc sums[kMaxTileRows] = {};
    for (int64_t r = 0; r < p.in.n_rows; ++r)
      for (int64_t i = 0; i < n; ++i) sums[i] += s.grads[r * lds + i];
    for (int64_t i = 0; i < n; ++i) d_bias[i] = p.overlapping ? d_bias[i] + sums[i] : sums[i];
  }

  // d_x_hat = sum_r (dS scale rows + w d_pooled), then back through the normalisation.
  static void add_bag_gradient(const PoolBagBackward& p, const TileReader<P, Acc>& reader,
                               int64_t row, int64_t n, const Element* x, int64_t ldx, Scratch& s) {
    const PoolBagParams& in = p.in;
    const int64_t n_rows = in.n_rows, dim = reader.dim, lds = reader.tile_rows;
    const Acc scale = static_cast<Acc>(in.scale);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t r = 0; r < n_rows; ++r) {
        s.tile_weights[i * 2 * n_rows + r] = P::weight(s.grads[r * lds + i] * scale);
        s.tile_weights[i * 2 * n_rows + n_rows + r] = P::weight(s.scores[r * lds + i]);
      }
    std::memset(s.d_tile, 0, n * dim * sizeof(Acc));
    accumulate<P>(s.tile_weights, 2 * n_rows, n, s.rows, dim, 2 * n_rows, dim, s.d_tile, dim);
    for (int64_t i = 0; i < n; ++i) {
      Acc* line = s.d_tile + i * dim;
      if (in.normalize) normalize_gradient(in.dim, x + i * ldx, s.rstd[i], line);
      // its weights are 0, but 0 times an infinite gradient is not
      if (excludes(static_cast<const Acc*>(in.bias), row + i))
        std::memset(line, 0, in.dim * sizeof(Acc));
      write_row(line, in.dim, p.overlapping, p.d_bag_type, p.d_bag, (row + i) * in.dim);
    }
  }
};

}  // namespace
}  // namespace survfuse
