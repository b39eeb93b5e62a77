// Backward of cross_attention over one chunk of the long side, weights recomputed from lse.
#pragma once

#include "cpu/cross_attention_tile.h"
#include "cpu/gradients.h"

namespace survfuse {
namespace {

template <class P, class Acc>
struct CrossAttentionBackwardKernel {
  using Tile = CrossAttentionTile<P, Acc>;
  using Element = typename P::Element;

  // Rows of a tile: where they lie, and where their gradients go.
  struct Here {
    int64_t bag, head, row, position, n;
    int64_t offset;  // among the rows whose logits are held
    const Element *x1, *x2;
    int64_t ld1, ld2;
  };

  static void run(const CrossAttentionBackward& p, const Sides& sides, const WorkItem& item,
                  int64_t out_row, char* memory, void* slot_memory) {
    const CrossAttentionParams& in = p.in;
    Tile t(in, sides.short_lengths[item.bag], sides.short_max);
    t.lay_out(Arena{memory});
    const int64_t start = sides.short_starts[item.bag];
    t.load_short(t.few ? in.query : in.key, start, in.dim, t.dim, !t.few, t.short1);
    t.load_short(t.few ? p.d_out : in.value, t.few ? out_row : start, in.value_dim, t.value_dim,
                 !t.few, t.short2);
    if (t.few ? p.d_key : p.d_query) t.pack_short(1);
    if (t.few && p.d_value) t.pack_short(2);
    Slot<Acc> slot(slot_memory, in, sides.short_max, true);
    const int64_t rows = in.n_heads * t.n_short;
    std::memset(slot.first, 0, rows * slot_columns(in.dim) * sizeof(Acc));
    if (!t.few) {
      std::memset(slot.second, 0, rows * slot_columns(in.value_dim) * sizeof(Acc));
      std::memset(slot.third, 0, rows * sizeof(Acc));
    }
    if (t.few && item.length == sides.long_lengths[item.bag] && t.holds(item.length))
      return run_whole(p, item, out_row, t, slot);
    for (int64_t done = 0; done < item.length; done += t.height) {
      Here at = part_of(item, done, t.height);
      for (at.head = 0; at.head < in.n_heads; ++at.head) {
        read(p, t, at, out_row);
        score(t, at);
        if (t.few)
          few_queries(p, t, at, out_row, false);
        else
          few_keys(p, t, at, start, out_row + at.position, slot);
        add_gradients(p, t, at, slot);
      }
    }
  }

 private:
  static Here part_of(const WorkItem& item, int64_t done, int64_t height) {
    return {item.bag,
            0,
            item.row + done,
            item.position + done,
            std::min(height, item.length - done),
            0,
            nullptr,
            nullptr,
            0,
            0};
  }

  // Few queries over a short bag: all logits of a head are there before any gradient is taken, so
  // that their softmax and its mean are those of these very numbers. Over few keys little but its
  // rounding may be left of a difference from the mean.
  static void run_whole(const CrossAttentionBackward& p, const WorkItem& item, int64_t out_row,
                        Tile& t, Slot<Acc>& slot) {
    Acc *scores = t.scores, *grads = t.grads;
    t.ld_scores = round_up(item.length, kLanes<Acc>);
    for (int64_t h = 0; h < p.in.n_heads; ++h) {
      const auto each_tile = [&](const auto& body) {
        for (int64_t done = 0; done < item.length; done += t.height) {
          Here at = part_of(item, done, t.height);
          at.head = h;
          at.offset = done;
          t.scores = scores + done;
          t.grads = grads + done;
          read(p, t, at, out_row);
          body(at);
        }
        t.scores = scores;
        t.grads = grads;
      };
      each_tile([&](const Here& at) { score(t, at); });
      Here whole = part_of(item, 0, item.length);
      whole.head = h;
      few_queries(p, t, whole, out_row, true);
      each_tile([&](const Here& at) { add_gradients(p, t, at, slot); });
    }
  }

  // The tile of the long side.
  static void read(const CrossAttentionBackward& p, Tile& t, Here& at, int64_t out_row) {
    const CrossAttentionParams& in = p.in;
    const int64_t h = at.head;
    if (h == 0 || !t.shared)
      t.read_long(t.few ? in.key : in.query, h, in.dim, t.few, !t.few, at.row, at.n, t.buffer1,
                  &at.x1, &at.ld1);
    t.read_long(t.few ? in.value : p.d_out, h, in.value_dim, t.few, false,
                t.few ? at.row : out_row + at.position, at.n, t.buffer2, &at.x2, &at.ld2);
  }

  // Both products of the tile with the short side.
  static void score(Tile& t, const Here& at) {
    const int64_t h = at.head;
    t.score(t.short1 + h * t.padded_short * t.dim, t.dim, at.x1, at.ld1, at.n, t.scores,
            at.x1 != t.buffer1);
    t.score(t.short2 + h * t.padded_short * t.value_dim, t.value_dim, at.x2, at.ld2, at.n, t.grads,
            at.x2 != t.buffer2);
  }

  // scores become the weights after dropout, grads the gradients of the logits.
  // whole: these are all keys of the bag.
  static void few_queries(const CrossAttentionBackward& p, Tile& t, const Here& at, int64_t out_row,
                          bool whole) {
    const CrossAttentionParams& in = p.in;
    for (int64_t r = 0; r < t.n_short; ++r) {
      Acc *scores = t.scores + r * t.ld_scores, *grads = t.grads + r * t.ld_scores;
      const int64_t query = (out_row + r) * in.n_heads + at.head;
      const Acc lse = static_cast<const Acc*>(p.lse)[query];
      const Acc d_lse = static_cast<const Acc*>(p.d_lse)[query];
      if (lse == -static_cast<Acc>(INFINITY)) {
        std::memset(scores, 0, at.n * sizeof(Acc));
        std::memset(grads, 0, at.n * sizeof(Acc));
        continue;
      }
      t.finish_logits(scores, at.row, at.n);
      exp_row(scores, lse, at.n, scores);
      Acc* softmax = scores;
      if (in.dropout_p > 0) {
        std::memcpy(t.kept, scores, at.n * sizeof(Acc));
        softmax = t.kept;
        Dropout<Acc>(in.seed, in.dropout_p)
            .apply(at.bag, r * in.n_heads + at.head, 0, at.position, 1, at.n, scores);
      }
      const Acc mean = whole ? normalize_row(scores, grads, softmax, at.n)
                             : static_cast<const Acc*>(p.mean)[query];
      for (int64_t i = 0; i < at.n; ++i)
        grads[i] = scores[i] * grads[i] - softmax[i] * mean + softmax[i] * d_lse;
      // an excluded key has no gradient, even where that of a result is infinite
      for (int64_t i = 0; in.bias && i < at.n; ++i)
        if (t.excluded(at.row + i)) scores[i] = grads[i] = 0;
    }
  }

  // Takes the rounding of lse out of a row's weights; returns the mean of their gradients.
  static Acc normalize_row(Acc* weights, const Acc* grads, Acc* softmax, int64_t n) {
    const Acc mean = weighted_sum(weights, grads, n), total = row_sum(softmax, n);
    if (total == 0) return 0;
    for (int64_t i = 0; i < n; ++i) weights[i] /= total;
    for (int64_t i = 0; softmax != weights && i < n; ++i) softmax[i] /= total;
    return mean / total;
  }

  static void few_keys(const CrossAttentionBackward& p, Tile& t, const Here& at, int64_t key,
                       int64_t out_row, Slot<Acc>& slot) {
    const CrossAttentionParams& in = p.in;
    const Acc infinity = static_cast<Acc>(INFINITY), scale = static_cast<Acc>(in.scale);
    const int64_t n = at.n, ld = t.ld_scores;
    for (int64_t i = 0; i < n; ++i) {
      t.top[i] = static_cast<const Acc*>(p.lse)[(out_row + i) * in.n_heads + at.head];
      t.sum[i] = t.mean[i] = 0;
    }
    // the softmax goes to the memory of the rows' gradients until dropout has had its part
    for (int64_t r = 0; r < t.n_short; ++r) {
      Acc *scores = t.scores + r * ld, *grads = t.grads + r * ld;
      const Acc bias = in.bias ? t.bias_of(key + r, at.head) : 0;
      for (int64_t i = 0; i < n; ++i)
        scores[i] = t.top[i] == -infinity ? -infinity : scores[i] * scale + bias - t.top[i];
      exp_row(scores, Acc(0), n, scores);
      for (int64_t i = 0; i < n; ++i) {
        t.sum[i] += scores[i];
        if (bias == -infinity) grads[i] = 0;
      }
      if (in.dropout_p > 0) {
        std::memcpy(t.kept, scores, n * sizeof(Acc));
        dropout(p, t, at, r, t.kept);
        for (int64_t i = 0; i < n; ++i) t.mean[i] += t.kept[i] * grads[i];
      } else {
        for (int64_t i = 0; i < n; ++i) t.mean[i] += scores[i] * grads[i];
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      t.sum[i] = t.sum[i] == 0 ? 0 : 1 / t.sum[i];
      t.mean[i] *= t.sum[i];
      t.top[i] = static_cast<const Acc*>(p.d_lse)[(out_row + i) * in.n_heads + at.head];
    }
    Acc* d_bias = slot.third + at.head * t.n_short;
    for (int64_t r = 0; r < t.n_short; ++r) {
      Acc *scores = t.scores + r * ld, *grads = t.grads + r * ld;
      // takes the rounding of lse out of the weights
      for (int64_t i = 0; i < n; ++i) scores[i] *= t.sum[i];
      if (in.dropout_p > 0) {
        std::memcpy(t.kept, scores, n * sizeof(Acc));
        dropout(p, t, at, r, t.kept);
        for (int64_t i = 0; i < n; ++i)
          grads[i] = t.kept[i] * grads[i] - scores[i] * t.mean[i] + scores[i] * t.top[i];
        std::memcpy(scores, t.kept, n * sizeof(Acc));
      } else {
        for (int64_t i = 0; i < n; ++i)
          grads[i] = scores[i] * (grads[i] - t.mean[i]) + scores[i] * t.top[i];
      }
      // a weight of 0 has no gradient, even where that of lse is infinite
      for (int64_t i = 0; i < n; ++i) grads[i] = t.sum[i] == 0 ? 0 : grads[i];
      if (p.d_bias) d_bias[r] += row_sum(grads, n);
    }
  }

  static void dropout(const CrossAttentionBackward& p, const Tile&, const Here& at, int64_t r,
                      Acc* values) {
    const CrossAttentionParams& in = p.in;
    Dropout<Acc>(in.seed, in.dropout_p)
        .apply(at.bag, at.position * in.n_heads + at.head, in.n_heads, r, 0, at.n, values);
  }

  // All gradients a tile gives, from its weights and the gradients of its logits.
  static void add_gradients(const CrossAttentionBackward& p, Tile& t, const Here& at,
                            Slot<Acc>& slot) {
    if (t.few && p.d_bias) add_bias(p, t, at);
    const Acc scale = static_cast<Acc>(p.in.scale);
    for (int64_t r = 0; r < t.n_short; ++r)
      for (int64_t i = 0; i < at.n; ++i) t.grads[r * t.ld_scores + i] *= scale;
    gather(p, t, at, slot);
    scatter(p, t, at);
  }

  // What the tile adds to the gradients of the short rows.
  static void gather(const CrossAttentionBackward& p, Tile& t, const Here& at, Slot<Acc>& slot) {
    const CrossAttentionParams& in = p.in;
    const int64_t ld1 = slot_columns(in.dim), ld2 = slot_columns(in.value_dim);
    const int64_t first = at.head * t.n_short;
    if (t.few ? p.d_query != nullptr : p.d_key != nullptr)
      t.gather(t.grads, at.n, at.x1, at.ld1, t.dim, slot.first + first * ld1, ld1);
    if (!t.few && p.d_value)
      t.gather(t.scores, at.n, at.x2, at.ld2, t.value_dim, slot.second + first * ld2, ld2);
  }

  // The gradients of the tile's own rows.
  static void scatter(const CrossAttentionBackward& p, Tile& t, const Here& at) {
    const CrossAttentionParams& in = p.in;
    if (void* d_long = t.few ? p.d_key : p.d_query) {
      if (t.shared)
        add_shared(p, t, at, d_long);
      else
        write_rows(p, t, at, t.grads, t.short_rows(1, at.head), in.dim, t.row1, d_long);
    }
    if (t.few && p.d_value)
      write_rows(p, t, at, t.scores, t.short_rows(2, at.head), in.value_dim, t.row2, p.d_value);
  }

  // A bag's gradient of the bias is the sum over its heads; bags that share the key add theirs.
  static void add_bias(const CrossAttentionBackward& p, Tile& t, const Here& at) {
    Acc* line = t.d_bias + at.offset;
    Acc* d_bias = static_cast<Acc*>(p.d_bias) + at.row;
    for (int64_t i = 0; i < at.n; ++i) {
      Acc total = 0;
      for (int64_t r = 0; r < t.n_short; ++r) total += t.grads[r * t.ld_scores + i];
      line[i] = at.head > 0 ? line[i] + total : total;
      if (at.head == p.in.n_heads - 1) d_bias[i] = p.overlapping ? d_bias[i] + line[i] : line[i];
    }
  }

  // Rows m^T . a of one head, straight to where they go if that takes whole registers.
  static void write_rows(const CrossAttentionBackward& p, Tile& t, const Here& at, const Acc* m,
                         const typename Tile::Short& a, int64_t width, Acc* buffer, void* target) {
    const CrossAttentionParams& in = p.in;
    const int64_t step = in.n_heads * width, first = (at.row * in.n_heads + at.head) * width;
    const bool straight = !p.overlapping && !in.normalize && !(t.few && in.bias) &&
                          t.writes_rows(p.d_long_type, width, a.width);
    Acc* rows = straight ? static_cast<Acc*>(target) + first : buffer;
    const int64_t ld = straight ? step : a.width;
    t.template scatter<true>(m, at.n, a, rows, ld);
    for (int64_t i = 0; !straight && i < at.n; ++i) {
      Acc* line = rows + i * ld;
      // its weights are 0, but 0 times an infinite gradient is not
      if (t.few && in.bias && t.excluded(at.row + i)) std::memset(line, 0, width * sizeof(Acc));
      write_row(line, width, p.overlapping, p.d_long_type, target, first + i * step);
    }
  }

  // Rows all heads share: their gradients are added up, then go back through the normalisation.
  static void add_shared(const CrossAttentionBackward& p, Tile& t, const Here& at, void* target) {
    const CrossAttentionParams& in = p.in;
    const typename Tile::Short a = t.short_rows(1, at.head);
    if (at.head == 0)
      t.template scatter<true>(t.grads, at.n, a, t.row1, t.dim);
    else
      t.template scatter<false>(t.grads, at.n, a, t.row1, t.dim);
    if (at.head < in.n_heads - 1) return;
    for (int64_t i = 0; i < at.n; ++i) {
      Acc* line = t.row1 + i * t.dim;
      if (in.normalize) normalize_gradient(in.dim, at.x1 + i * at.ld1, t.rstd[i], line);
      write_row(line, in.dim, p.overlapping, p.d_long_type, target, (at.row + i) * in.dim);
    }
  }
};

}  // namespace
}  // namespace survfuse
