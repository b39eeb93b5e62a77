// Backward of position_biased_attention over one item: logits are computed again, tile by tile of
// keys, and the bias' gradient is taken while a batch of strips is in the nearest caches.
#pragma once

#include "cpu/position_biased_attention_tile.h"

namespace survfuse {
namespace {

// pairs whose hidden layers are held together, in whole rows
constexpr int64_t kBatchPairs = 384;

template <class T, class Net>
struct BiasedBackwardKernel {
  using P = VectorProducts<T>;

  BiasedTile<T> t;
  int64_t batch_rows, batch_strips;
  Net net;
  const BiasedBackward* p = nullptr;
  int64_t packed = 0;              // the block's first row among all bags'
  T *u, *slopes, *d_u;             // [batch_strips, 2, kStrip]
  T *values, *d_values;            // [O, kStrip], [batch_strips, O, kStrip]
  T *d_out, *grads;                // [O, kBlockRows, value_dim], [O, kBlockRows, tile]
  T *lse, *mean, *d_lse;           // [O, kBlockRows]
  T* out;                          // [value_dim]
  T* d_query;                      // [O, kBlockRows, dim]
  T *d_key, *d_value;              // [O, tile, dim], [O, tile, value_dim]
  T *d_query_at[2], *d_key_at[2];  // [kBlockRows, lanes], [tile]

  explicit BiasedBackwardKernel(const BiasedParams& in)
      : t(in, true),
        batch_rows(std::max<int64_t>(1, kBatchPairs / t.tile)),
        batch_strips((batch_rows * t.tile + kStrip<T> - 1) / kStrip<T>),
        net(in, batch_strips) {}

  int64_t lay_out(Arena arena) {
    t.lay_out(arena);
    net.lay_out(arena);
    for (T** strips : {&u, &slopes, &d_u}) *strips = arena.take<T>(batch_strips * 2 * kStrip<T>);
    values = arena.take<T>(t.heads * kStrip<T>);
    d_values = arena.take<T>(batch_strips * t.heads * kStrip<T>);
    d_out = arena.take<T>(t.heads * kBlockRows * t.value_dim);
    grads = arena.take<T>(t.heads * kBlockRows * t.tile);
    for (T** rows : {&lse, &mean, &d_lse}) *rows = arena.take<T>(t.heads * kBlockRows);
    out = arena.take<T>(t.value_dim);
    d_query = arena.take<T>(t.heads * kBlockRows * t.dim);
    d_key = arena.take<T>(t.heads * t.tile * t.dim);
    d_value = arena.take<T>(t.heads * t.tile * t.value_dim);
    for (int axis = 0; axis < 2; ++axis) {
      d_query_at[axis] = arena.take<T>(kBlockRows * kLanes<T>);
      d_key_at[axis] = arena.take<T>(t.tile);
    }
    return arena.used;
  }

  static void run(const BiasedBackward& p, const BiasedItem& item, const KeySums& sums,
                  void* d_parameters, char* scratch) {
    BiasedBackwardKernel kernel(p.in);
    kernel.lay_out(Arena{scratch});
    kernel.p = &p;
    BiasedTile<T>& t = kernel.t;
    t.begin(item);
    for (int64_t tile = 0; tile < t.n_tiles; ++tile) {
      t.read_keys(tile);
      kernel.clear_keys();
      for (int64_t from = item.first; from < item.first + item.n_rows; from += kBlockRows) {
        t.read_queries(from);
        kernel.packed = item.packed + from - item.first;
        kernel.read_gradients();
        t.score();
        if (p.in.dropout_p > 0) t.draw_mask();
        kernel.pairs(static_cast<T*>(d_parameters), p.d_query_pos || sums.d_pos);
        for (int64_t o = 0; o < t.heads; ++o) kernel.multiply(o, sums);
        kernel.write_queries(tile == 0);
      }
      kernel.add_keys(sums);
    }
  }

 private:
  void clear_keys() {
    std::fill(d_key, d_key + t.heads * t.tile * t.dim, T(0));
    std::fill(d_value, d_value + t.heads * t.tile * t.value_dim, T(0));
    for (T* places : d_key_at) std::fill(places, places + t.tile, T(0));
  }

  // What the results were given, and the gradients of the weights.
  void read_gradients() {
    for (int64_t o = 0; o < t.heads; ++o) {
      T* rows = d_out + o * kBlockRows * t.value_dim;
      widen_rows(p->d_out, 0, t.head(o), packed, t.n, t.in.value_dim, t.value_dim, T(1), rows);
      accumulate<P, true>(rows, t.value_dim, t.n, t.value_columns + o * t.value_dim * t.tile,
                          t.tile, t.in.value_dim, t.tile, grads_of(o), t.tile);
      for (int64_t i = 0; i < t.n; ++i) {
        const int64_t from = (packed + i) * t.in.n_heads + t.head(o), to = o * kBlockRows + i;
        const T given = static_cast<const T*>(p->lse)[from];
        // where no key is included every weight is 0
        lse[to] = given == -static_cast<T>(INFINITY) ? -given : given;
        if (t.n_tiles > 1) mean[to] = mean_gradient(o, i);
        d_lse[to] = static_cast<const T*>(p->d_lse)[from];
      }
    }
    for (T* places : d_query_at) std::fill(places, places + kBlockRows * kLanes<T>, T(0));
  }

  T* grads_of(int64_t o) const { return grads + o * kBlockRows * t.tile; }

  // The mean of the gradients of a row's weights: each has it subtracted and most of both cancels,
  // so this sum adds no rounding.
  T mean_gradient(int64_t o, int64_t i) const {
    widen_rows(p->out, 0, t.head(o), packed + i, 1, t.in.value_dim, t.value_dim, T(1), out);
    const T* d = d_out + (o * kBlockRows + i) * t.value_dim;
    double sum = 0;
    for (int64_t e = 0; e < t.in.value_dim; ++e) sum += static_cast<double>(out[e]) * d[e];
    return static_cast<T>(sum);
  }

  // From logits and gradients of weights to weights and gradients of logits, and all that the bias
  // is made of.
  void pairs(T* d_parameters, bool positions) {
    const int64_t per_row = t.tile / kLanes<T>;
    for (int64_t row = 0; row < t.n; row += batch_rows) {
      const int64_t n_rows = std::min(batch_rows, t.n - row);
      const int64_t begin = row * per_row, end = (row + n_rows) * per_row;
      const int64_t n_strips = (end - begin + kStripVectors - 1) / kStripVectors;
      for (int64_t s = 0; s < n_strips; ++s) {
        const int64_t vector = begin + s * kStripVectors;
        T* at = u + s * 2 * kStrip<T>;
        t.template offsets<true>(vector, at, slopes + s * 2 * kStrip<T>);
        net.evaluate(s, at, values);
        for (int v = 0; v < kStripVectors && vector + v < end; ++v) soften(vector + v, v);
      }
      for (int64_t o = 0; t.n_tiles == 1 && o < t.heads; ++o)
        for (int64_t i = row; i < row + n_rows; ++i) balance(o, i);
      for (int64_t s = 0; s < n_strips; ++s)
        for (int v = 0; v < kStripVectors; ++v)
          weigh(begin + s * kStripVectors + v, end,
                d_values + s * t.heads * kStrip<T> + v * kLanes<T>);
      if (!d_parameters && !positions) continue;
      net.differentiate(n_strips, u, d_values, d_parameters, positions ? d_u : nullptr);
      if (positions) move(begin, end);
    }
  }

  // From logits to their softmax.
  void soften(int64_t vector, int v) {
    const int64_t per_row = t.tile / kLanes<T>, i = vector / per_row;
    const int64_t n_left = std::max<int64_t>(0, t.n_keys - vector % per_row * kLanes<T>);
    for (int64_t o = 0; o < t.heads; ++o) {
      T* logit = t.logits_of(o) + vector * kLanes<T>;
      const Vec<T> bias = load(values + o * kStrip<T> + v * kLanes<T>);
      const Vec<T> softmax = vector_exp(load(logit) + bias - splat(lse[o * kBlockRows + i]));
      store(logit, n_left < kLanes<T> ? kept(softmax, n_left) : softmax);
    }
  }

  // A row that sees all of its keys at once: its softmax sums to 1 whatever the rounding of lse,
  // and its mean gradient is that of these very numbers. With few keys little else may be left.
  void balance(int64_t o, int64_t i) {
    T *softmax = t.logits_of(o) + i * t.tile, *grad = grads_of(o) + i * t.tile;
    const T* factor = t.mask + (o * kBlockRows + i) * t.tile;
    Vec<T> sum{};
    for (int64_t j = 0; j < t.tile; j += kLanes<T>) sum += load(softmax + j);
    const T total = horizontal_sum<T>(sum);
    const Vec<T> divisor = splat(total == 0 ? T(1) : total);
    sum = Vec<T>{};
    for (int64_t j = 0; j < t.tile; j += kLanes<T>) {
      const Vec<T> x = load(softmax + j) / divisor;
      store(softmax + j, x);
      sum += (t.in.dropout_p > 0 ? x * load(factor + j) : x) * load(grad + j);
    }
    mean[o * kBlockRows + i] = horizontal_sum<T>(sum);
  }

  // From softmax and gradients of weights to weights and gradients of logits, d [O, kStrip] too.
  void weigh(int64_t vector, int64_t end, T* d) {
    const int64_t i = vector / (t.tile / kLanes<T>);
    for (int64_t o = 0; o < t.heads; ++o) {
      if (vector >= end) {
        store(d + o * kStrip<T>, Vec<T>{});
        continue;
      }
      const int64_t at = vector * kLanes<T>, row = o * kBlockRows + i;
      T *weight = t.logits_of(o) + at, *grad = grads_of(o) + at;
      const Vec<T> softmax = load(weight);
      Vec<T> kept = softmax;
      if (t.in.dropout_p > 0) kept *= load(t.mask + o * kBlockRows * t.tile + at);
      const Vec<T> d_logit =
          (kept * load(grad) - softmax * splat(mean[row])) + softmax * splat(d_lse[row]);
      store(weight, kept);
      store(grad, d_logit);
      store(d + o * kStrip<T>, d_logit);
    }
  }

  // The first n lanes; the others 0 whatever they hold.
  static Vec<T> kept(Vec<T> x, int64_t n) {
    T lane[kLanes<T>] = {};
    std::memcpy(lane, &x, n * sizeof(T));
    return load(lane);
  }

  // The gradients of offsets to both ends.
  void move(int64_t begin, int64_t end) {
    const int64_t per_row = t.tile / kLanes<T>;
    for (int64_t vector = begin; vector < end; ++vector) {
      const int64_t strip = (vector - begin) / kStripVectors, v = (vector - begin) % kStripVectors;
      const int64_t i = vector / per_row, j = vector % per_row * kLanes<T>;
      for (int axis = 0; axis < 2; ++axis) {
        const int64_t at = (strip * 2 + axis) * kStrip<T> + v * kLanes<T>;
        const Vec<T> d = load(d_u + at) * load(slopes + at);
        T *query_at = d_query_at[axis] + i * kLanes<T>, *key_at = d_key_at[axis] + j;
        store(query_at, load(query_at) + d);
        store(key_at, load(key_at) - d);
      }
    }
  }

  // The products of head o that follow from weights and gradients of logits.
  void multiply(int64_t o, const KeySums& sums) {
    const T *weights = t.logits_of(o), *d_logits = grads_of(o);
    if (p->d_query)
      accumulate<P, true>(d_logits, t.tile, t.n, t.key_rows + o * t.tile * t.dim, t.dim, t.tile,
                          t.dim, d_query + o * kBlockRows * t.dim, t.dim);
    if (sums.d_key)
      accumulate<P>(d_logits, 1, t.n_keys, t.queries + o * kBlockRows * t.dim, t.dim, t.n, t.dim,
                    d_key + o * t.tile * t.dim, t.dim, {}, t.tile);
    if (sums.d_value)
      accumulate<P>(weights, 1, t.n_keys, d_out + o * kBlockRows * t.value_dim, t.value_dim, t.n,
                    t.value_dim, d_value + o * t.tile * t.value_dim, t.value_dim, {}, t.tile);
  }

  void write_queries(bool fresh) const {
    const T scale = static_cast<T>(t.in.scale);
    for (int64_t o = 0; p->d_query && o < t.heads; ++o)
      for (int64_t i = 0; i < t.n; ++i) {
        T* to = static_cast<T*>(p->d_query) + ((packed + i) * t.in.n_heads + t.head(o)) * t.in.dim;
        const T* from = d_query + (o * kBlockRows + i) * t.dim;
        for (int64_t d = 0; d < t.in.dim; ++d) to[d] = (fresh ? T(0) : to[d]) + from[d] * scale;
      }
    for (int64_t i = 0; p->d_query_pos && i < t.n; ++i) {
      T* to = static_cast<T*>(p->d_query_pos) + ((packed + i) * t.in.n_groups + t.item->group) * 2;
      for (int axis = 0; axis < 2; ++axis)
        to[axis] =
            (fresh ? T(0) : to[axis]) + horizontal_sum<T>(load(d_query_at[axis] + i * kLanes<T>));
    }
  }

  void add_keys(const KeySums& sums) const {
    const auto add = [&](void* to, int64_t row_stride, int64_t head_stride, const T* from,
                         int64_t width, int64_t padded) {
      for (int64_t o = 0; to && o < t.heads; ++o)
        for (int64_t j = 0; j < t.n_keys; ++j) {
          T* row = static_cast<T*>(to) + (t.first_key + j) * row_stride + o * head_stride;
          const T* sum = from + (o * t.tile + j) * padded;
          for (int64_t d = 0; d < width; ++d) row[d] += sum[d];
        }
    };
    add(sums.d_key, sums.row_stride, sums.head_stride, d_key, t.in.dim, t.dim);
    add(sums.d_value, sums.value_row_stride, sums.value_head_stride, d_value, t.in.value_dim,
        t.value_dim);
    T* places = static_cast<T*>(sums.d_pos) + t.first_key * 2;
    for (int64_t j = 0; sums.d_pos && j < t.n_keys; ++j)
      for (int axis = 0; axis < 2; ++axis) places[2 * j + axis] += d_key_at[axis][j];
  }
};

}  // namespace
}  // namespace survfuse
