// Forward of cross_attention over one chunk of the long side.
#pragma once

#include "cpu/cross_attention_tile.h"
#include "cpu/gradients.h"

namespace survfuse {
namespace {

template <class P, class Acc>
struct CrossAttentionForwardKernel {
  using Tile = CrossAttentionTile<P, Acc>;
  using Element = typename P::Element;

  static void run(const CrossAttentionForward& p, const Sides& sides, const WorkItem& item,
                  int64_t out_row, char* memory, void* slot_memory) {
    const CrossAttentionParams& in = p.in;
    Tile t(in, sides.short_lengths[item.bag], sides.short_max);
    t.lay_out(Arena{memory});
    const int64_t start = sides.short_starts[item.bag];
    t.load_short(t.few ? in.query : in.key, start, in.dim, t.dim, !t.few, t.short1);
    if (!t.few) {
      t.load_short(in.value, start, in.value_dim, t.value_dim, true, t.short2);
      t.pack_short(2);
    }
    Slot<Acc> slot(slot_memory, in, sides.short_max, false);
    if (t.few) clear(t, slot);
    for (int64_t done = 0; done < item.length; done += t.height) {
      const int64_t n = std::min(t.height, item.length - done);
      const int64_t row = item.row + done, position = item.position + done;
      const Element* x = nullptr;
      int64_t ldx = 0;
      for (int64_t h = 0; h < in.n_heads; ++h) {
        if (h == 0 || !t.shared)
          t.read_long(t.few ? in.key : in.query, h, in.dim, t.few, !t.few, row, n, t.buffer1, &x,
                      &ldx);
        t.score(t.short1 + h * t.padded_short * t.dim, t.dim, x, ldx, n, t.scores, x != t.buffer1);
        if (t.few)
          pool(p, t, item.bag, h, row, position, n, slot);
        else
          spread(p, t, item.bag, h, start, out_row + position, position, n);
      }
    }
  }

 private:
  static void clear(const Tile& t, Slot<Acc>& slot) {
    const int64_t rows = t.in.n_heads * t.n_short;
    std::memset(slot.first, 0, rows * slot_columns(t.in.value_dim) * sizeof(Acc));
    for (int64_t r = 0; r < rows; ++r) {
      slot.second[r] = -static_cast<Acc>(INFINITY);
      slot.third[r] = 0;
    }
  }

  // Few queries: the running softmax of each row over the tiles of keys.
  static void pool(const CrossAttentionForward& p, Tile& t, int64_t bag, int64_t h, int64_t row,
                   int64_t position, int64_t n, Slot<Acc>& slot) {
    const CrossAttentionParams& in = p.in;
    const int64_t ldz = slot_columns(in.value_dim);
    Acc* z = slot.first + h * t.n_short * ldz;
    for (int64_t r = 0; r < t.n_short; ++r) {
      Acc* scores = t.scores + r * t.ld_scores;
      Acc &max = slot.second[h * t.n_short + r], &sum = slot.third[h * t.n_short + r];
      t.finish_logits(scores, row, n);
      const Acc top = row_max(scores, n, max);
      if (top > max) {
        const Acc factor = sum == 0 ? 0 : std::exp(max - top);
        sum *= factor;
        for (int64_t d = 0; sum != 0 && d < ldz; ++d) z[r * ldz + d] *= factor;
        max = top;
      }
      if (top == -static_cast<Acc>(INFINITY)) {
        // nothing included so far; a NaN logit is no -inf and goes on as NaN
        for (int64_t i = 0; i < n; ++i) scores[i] = scores[i] == scores[i] ? 0 : scores[i];
      } else {
        exp_row(scores, top, n, scores);
      }
      sum += row_sum(scores, n);
      if (in.dropout_p > 0)
        Dropout<Acc>(in.seed, in.dropout_p)
            .apply(bag, r * in.n_heads + h, 0, position, 1, n, scores);
    }
    const Element* v;
    int64_t ldv;
    t.read_long(in.value, h, in.value_dim, true, false, row, n, t.buffer2, &v, &ldv);
    t.gather(t.scores, n, v, ldv, t.value_dim, z, ldz);
  }

  // Few keys: the softmax of each column, whole at once.
  static void spread(const CrossAttentionForward& p, Tile& t, int64_t bag, int64_t h, int64_t key,
                     int64_t out_row, int64_t position, int64_t n) {
    const CrossAttentionParams& in = p.in;
    const Acc infinity = static_cast<Acc>(INFINITY), scale = static_cast<Acc>(in.scale);
    for (int64_t i = 0; i < t.ld_scores; ++i) {
      t.top[i] = -infinity;
      t.sum[i] = 0;
    }
    for (int64_t r = 0; r < t.n_short; ++r) {
      Acc* scores = t.scores + r * t.ld_scores;
      const Acc bias = in.bias ? t.bias_of(key + r, h) : 0;
      for (int64_t i = 0; i < n; ++i) {
        scores[i] = scores[i] * scale + bias;
        t.top[i] = scores[i] > t.top[i] ? scores[i] : t.top[i];
      }
    }
    for (int64_t i = 0; i < n; ++i) t.mean[i] = t.top[i] == -infinity ? 0 : t.top[i];
    for (int64_t r = 0; r < t.n_short; ++r) {
      Acc* scores = t.scores + r * t.ld_scores;
      for (int64_t i = 0; i < n; ++i) scores[i] -= t.mean[i];
      exp_row(scores, Acc(0), n, scores);
      for (int64_t i = 0; i < n; ++i) t.sum[i] += scores[i];
      if (in.dropout_p > 0)
        Dropout<Acc>(in.seed, in.dropout_p)
            .apply(bag, position * in.n_heads + h, in.n_heads, r, 0, n, scores);
    }
    for (int64_t i = 0; i < n; ++i) {
      const Acc sum = t.sum[i];
      static_cast<Acc*>(p.lse)[(out_row + i) * in.n_heads + h] =
          sum == 0 ? -infinity : (t.top[i] == infinity ? infinity : t.mean[i] + std::log(sum));
      t.sum[i] = sum == 0 ? 0 : 1 / sum;
    }
    for (int64_t r = 0; r < t.n_short; ++r)
      for (int64_t i = 0; i < n; ++i) t.scores[r * t.ld_scores + i] *= t.sum[i];
    const int64_t at = (out_row * in.n_heads + h) * in.value_dim, step = in.n_heads * in.value_dim;
    // straight to where they go, if that takes whole registers of this very type
    const bool straight = t.writes_rows(p.out_type, in.value_dim, t.value_dim);
    Acc* out = straight ? static_cast<Acc*>(p.out) + at : t.row2;
    const int64_t ldo = straight ? step : t.value_dim;
    t.template scatter<true>(t.scores, n, t.short_rows(2, h), out, ldo);
    for (int64_t i = 0; !straight && i < n; ++i)
      write_row(out + i * ldo, in.value_dim, false, p.out_type, p.out, at + i * step);
  }
};

}  // namespace
}  // namespace survfuse
