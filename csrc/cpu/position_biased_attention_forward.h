// Forward of position_biased_attention over one item: a softmax carried from tile to tile of keys.
#pragma once

#include "cpu/position_biased_attention_tile.h"

namespace survfuse {
namespace {

template <class T, class Net>
struct BiasedForwardKernel {
  using P = VectorProducts<T>;

  BiasedTile<T> t;
  Net net;
  T *u, *values;  // [2, kStrip], [O, kStrip]
  T* z;           // [O, kBlockRows, value_dim]
  T *top, *sum;   // [O, kBlockRows]

  explicit BiasedForwardKernel(const BiasedParams& in) : t(in, false), net(in, 1) {}

  int64_t lay_out(Arena arena) {
    t.lay_out(arena);
    net.lay_out(arena);
    u = arena.take<T>(2 * kStrip<T>);
    values = arena.take<T>(t.heads * kStrip<T>);
    z = arena.take<T>(t.heads * kBlockRows * t.value_dim);
    top = arena.take<T>(t.heads * kBlockRows);
    sum = arena.take<T>(t.heads * kBlockRows);
    return arena.used;
  }

  static void run(const BiasedForward& p, const BiasedItem& item, char* scratch) {
    BiasedForwardKernel kernel(p.in);
    kernel.lay_out(Arena{scratch});
    BiasedTile<T>& t = kernel.t;
    t.begin(item);
    for (int64_t from = item.first; from < item.first + item.n_rows; from += kBlockRows) {
      t.read_queries(from);
      kernel.clear();
      for (int64_t tile = 0; tile < t.n_tiles; ++tile) {
        t.read_keys(tile);
        t.score();
        kernel.add_bias();
        if (p.in.dropout_p > 0) t.draw_mask();
        for (int64_t o = 0; o < t.heads; ++o) kernel.weigh(o, tile == 0);
      }
      kernel.write(p, item.packed + from - item.first);
    }
  }

 private:
  void clear() {
    std::fill(top, top + t.heads * kBlockRows, -static_cast<T>(INFINITY));
    std::fill(sum, sum + t.heads * kBlockRows, T(0));
  }

  void add_bias() {
    const int64_t n_vectors = t.n_vectors();
    for (int64_t vector = 0; vector < n_vectors; vector += kStripVectors) {
      t.template offsets<false>(vector, u, nullptr);
      net.evaluate(0, u, values);
      const int64_t n = std::min<int64_t>(kStripVectors, n_vectors - vector);
      for (int64_t o = 0; o < t.heads; ++o) {
        T* logits = t.logits_of(o) + vector * kLanes<T>;
        const T* bias = values + o * kStrip<T>;
        for (int64_t i = 0; i < n * kLanes<T>; i += kLanes<T>)
          store(logits + i, load(logits + i) + load(bias + i));
      }
    }
  }

  // Takes the tile's keys into the softmax of head o.
  void weigh(int64_t o, bool fresh) {
    const T infinity = static_cast<T>(INFINITY);
    T* weights = t.logits_of(o);
    T* rows = z + o * kBlockRows * t.value_dim;
    for (int64_t i = 0; i < t.n; ++i) {
      T* row = weights + i * t.tile;
      std::fill(row + t.n_keys, row + t.tile, -infinity);
      T& highest = top[o * kBlockRows + i];
      const T before = highest;
      highest = row_max(row, t.tile, before);
      // where nothing is included so far, subtract 0 and not -inf
      const T shift = highest == -infinity ? T(0) : highest;
      exp_row(row, shift, t.tile, row);
      const T factor = before == -infinity ? T(0) : std::exp(before - shift);
      T& total = sum[o * kBlockRows + i];
      total = total * factor + row_sum(row, t.tile);
      if (t.in.dropout_p > 0) {
        const T* kept = t.mask + (o * kBlockRows + i) * t.tile;
        for (int64_t j = 0; j < t.tile; j += kLanes<T>)
          store(row + j, load(row + j) * load(kept + j));
      }
      for (int64_t d = 0; !fresh && factor != 1 && d < t.value_dim; ++d)
        rows[i * t.value_dim + d] *= factor;
    }
    const T* values_of = t.value_rows + o * t.tile * t.value_dim;
    if (fresh)
      accumulate<P, true>(weights, t.tile, t.n, values_of, t.value_dim, t.tile, t.value_dim, rows,
                          t.value_dim);
    else
      accumulate<P>(weights, t.tile, t.n, values_of, t.value_dim, t.tile, t.value_dim, rows,
                    t.value_dim);
  }

  void write(const BiasedForward& p, int64_t packed) const {
    const T infinity = static_cast<T>(INFINITY);
    const int64_t width = t.in.value_dim;
    for (int64_t o = 0; o < t.heads; ++o)
      for (int64_t i = 0; i < t.n; ++i) {
        const int64_t at = (packed + i) * t.in.n_heads + t.head(o);
        const T highest = top[o * kBlockRows + i], total = sum[o * kBlockRows + i];
        const T inverse = total == 0 ? T(0) : T(1) / total;
        static_cast<T*>(p.lse)[at] = total == 0            ? -infinity
                                     : highest == infinity ? infinity
                                                           : highest + std::log(total);
        T* out = static_cast<T*>(p.out) + at * width;
        const T* from = z + (o * kBlockRows + i) * t.value_dim;
        for (int64_t d = 0; d < width; ++d) out[d] = from[d] * inverse;
      }
  }
};

}  // namespace
}  // namespace survfuse
