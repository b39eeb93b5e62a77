// One item's keys and queries as the products of position_biased_attention take them.
#pragma once

#include <cstring>

#include "cpu/activations.h"
#include "cpu/arena.h"
#include "cpu/position_bias_mlp.h"
#include "cpu/position_biased_attention_plan.h"
#include "cpu/products.h"
#include "cpu/softmax.h"

namespace survfuse {
namespace {

constexpr int64_t kBlockRows = 32;         // queries that meet a tile of keys together
constexpr int64_t kMostTileKeys = 256;     // of keys
constexpr int64_t kKeyBytes = 512 * 1024;  // of a tile's keys and values, in all forms
constexpr int64_t kMostTileBytes = 2 * 1024 * 1024;

// n numbers of `rows` from element `at` on, widened.
template <class T>
inline void widen_row(const BiasedRows& rows, int64_t at, int64_t n, T* out) {
  const auto each = [&](const auto* from, const auto& widen) {
    int64_t d = 0;
    for (; d + kLanes<T> <= n; d += kLanes<T>) store(out + d, widen(from + d));
    for (; d < n; ++d) {
      std::remove_cv_t<std::remove_reference_t<decltype(*from)>> last[kLanes<T>] = {};
      last[0] = from[d];
      out[d] = widen(last)[0];
    }
  };
  switch (rows.type) {
    case ElementType::kFloat32:
      each(static_cast<const float*>(rows.data) + at, [](const float* p) { return widened<T>(p); });
      break;
    case ElementType::kFloat64:
      each(static_cast<const double*>(rows.data) + at,
           [](const double* p) { return widened<T>(p); });
      break;
    case ElementType::kBFloat16:
      each(static_cast<const uint16_t*>(rows.data) + at,
           [](const uint16_t* p) { return widened<T>(p, bf16_to_float); });
      break;
    case ElementType::kFloat16:
      each(static_cast<const uint16_t*>(rows.data) + at,
           [](const uint16_t* p) { return widened<T>(p, half_to_float); });
      break;
  }
}

// Rows of one head, widened, each padded by zeros to `padded` numbers and multiplied by `factor`.
template <class T>
inline void widen_rows(const BiasedRows& rows, int64_t bag, int64_t head, int64_t first, int64_t n,
                       int64_t width, int64_t padded, T factor, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    T* row = out + i * padded;
    const int64_t at =
        bag * rows.bag_stride + (first + i) * rows.row_stride + head * rows.head_stride;
    widen_row(rows, at, width, row);
    for (int64_t d = width; d < padded; ++d) row[d] = 0;
    for (int64_t d = 0; factor != 1 && d < padded; d += kLanes<T>)
      store(row + d, load(row + d) * factor);
  }
}

// The sizes of an item's pieces.
template <class T>
struct BiasedSizes {
  const BiasedParams& in;
  int64_t heads;           // of the group
  int64_t dim, value_dim;  // padded to whole vectors
  int64_t n_tiles, tile;   // keys are cut into tiles of nearly equal size, padded

  explicit BiasedSizes(const BiasedParams& params)
      : in(params),
        heads(heads_of_group(params)),
        dim(round_up(params.dim, kLanes<T>)),
        value_dim(round_up(params.value_dim, kLanes<T>)) {
    const int64_t key_bytes = 2 * heads * (dim + value_dim) * static_cast<int64_t>(sizeof(T));
    const int64_t most = std::clamp<int64_t>(kKeyBytes / key_bytes, 4 * kLanes<T>, kMostTileKeys);
    const int64_t n_equal = (in.n_keys + most - 1) / most;
    tile = round_up((in.n_keys + n_equal - 1) / n_equal, kLanes<T>);
    n_tiles = (in.n_keys + tile - 1) / tile;
  }
};

// The keys of one group in tiles, and one block of its queries.
template <class T>
struct BiasedTile : BiasedSizes<T> {
  using Base = BiasedSizes<T>;
  using Base::dim;
  using Base::heads;
  using Base::in;
  using Base::tile;
  using Base::value_dim;
  using P = VectorProducts<T>;

  bool backward;
  Dropout<T> dropout;

  T* queries;                         // [O, kBlockRows, dim], times the scale
  T *key_columns, *value_rows;        // [O, dim, tile], [O, tile, value_dim]
  T *key_rows, *value_columns;        // [O, tile, dim], [O, value_dim, tile]; backward
  T *logits, *mask;                   // [O, kBlockRows, tile]
  T* key_at[2];                       // [tile] places of the keys
  T* query_at[2];                     // [kBlockRows]
  T* turned;                          // one head's rows before they are turned
  int64_t first_key = 0, n_keys = 0;  // of the tile
  int64_t first = 0, n = 0;           // of the block, within the bag
  const BiasedItem* item = nullptr;
  int64_t held_tile = -1;

  BiasedTile(const BiasedParams& params, bool backward)
      : Base(params), backward(backward), dropout(params.seed, params.dropout_p) {}

  void lay_out(Arena& arena) {
    queries = arena.take<T>(heads * kBlockRows * dim);
    key_columns = arena.take<T>(heads * dim * tile);
    value_rows = arena.take<T>(heads * tile * value_dim);
    key_rows = arena.take<T>(backward ? heads * tile * dim : 0);
    value_columns = arena.take<T>(backward ? heads * tile * value_dim : 0);
    turned = arena.take<T>(tile * std::max(dim, value_dim));
    logits = arena.take<T>(heads * kBlockRows * tile);
    mask = arena.take<T>(in.dropout_p > 0 ? heads * kBlockRows * tile : 0);
    for (int axis = 0; axis < 2; ++axis) {
      key_at[axis] = arena.take<T>(tile);
      query_at[axis] = arena.take<T>(kBlockRows);
    }
  }

  void begin(const BiasedItem& one) {
    item = &one;
    held_tile = -1;
  }

  int64_t head(int64_t o) const { return item->group * heads + o; }

  // Tile number `index` of the item's keys; kept where it is held already.
  void read_keys(int64_t index) {
    if (index == held_tile) return;
    held_tile = index;
    first_key = index * tile;
    n_keys = std::min(tile, in.n_keys - first_key);
    for (int64_t o = 0; o < heads; ++o) {
      T* rows = backward ? key_rows + o * tile * dim : turned;
      read_side(in.key, o, in.dim, dim, rows);
      turn(rows, dim, key_columns + o * dim * tile);
      rows = value_rows + o * tile * value_dim;
      read_side(in.value, o, in.value_dim, value_dim, rows);
      if (backward) turn(rows, value_dim, value_columns + o * value_dim * tile);
    }
    const T* places = static_cast<const T*>(in.key_pos) +
                      ((item->bag * in.n_groups + item->group) * in.n_keys + first_key) * 2;
    for (int64_t j = 0; j < tile; ++j)
      for (int axis = 0; axis < 2; ++axis)
        key_at[axis][j] = j < n_keys ? places[2 * j + axis] : T(0);
  }

  // Queries from row `from` of the bag on.
  void read_queries(int64_t from) {
    first = from;
    n = std::min(kBlockRows, item->first + item->n_rows - from);
    const int64_t row = in.starts[item->bag] + from;
    for (int64_t o = 0; o < heads; ++o)
      widen_rows(in.query, 0, head(o), row, n, in.dim, dim, static_cast<T>(in.scale),
                 queries + o * kBlockRows * dim);
    const T* places = static_cast<const T*>(in.query_pos) + row * 2;
    for (int64_t i = 0; i < n; ++i)
      for (int axis = 0; axis < 2; ++axis) query_at[axis][i] = places[2 * i + axis];
  }

  // Logits without their bias.
  void score() {
    for (int64_t o = 0; o < heads; ++o)
      accumulate<P, true>(queries + o * kBlockRows * dim, dim, n, key_columns + o * dim * tile,
                          tile, in.dim, tile, logits_of(o), tile);
  }

  T* logits_of(int64_t o) const { return logits + o * kBlockRows * tile; }

  int64_t n_vectors() const { return n * (tile / kLanes<T>); }

  // u and du/d offset [2, kStrip] of the vectors of pairs from `vector` on; 0 behind the last.
  template <bool SLOPES>
  void offsets(int64_t vector, T* u, T* slopes) const {
    const int64_t per_row = tile / kLanes<T>;
    for (int v = 0; v < kStripVectors; ++v) {
      const int64_t i = (vector + v) / per_row, j = (vector + v) % per_row * kLanes<T>;
      for (int axis = 0; axis < 2; ++axis) {
        const int64_t to = axis * kStrip<T> + v * kLanes<T>;
        const Vec<T> d = i < n ? splat(query_at[axis][i]) - load(key_at[axis] + j) : Vec<T>{};
        const Vec<T> size = d < 0 ? -d : d;
        const Vec<T> log = vector_log1p(size);
        store(u + to, d < 0 ? -log : log);
        if (SLOPES) store(slopes + to, T(1) / (T(1) + size));
      }
    }
  }

  // The factors of the weights of a tile under dropout: 0 or 1 / (1 - p).
  void draw_mask() {
    for (int64_t o = 0; o < heads; ++o)
      for (int64_t i = 0; i < n; ++i) {
        T* row = mask + (o * kBlockRows + i) * tile;
        std::fill(row, row + tile, T(1));
        dropout.apply(item->bag, (first + i) * in.n_heads + head(o), 0, first_key, 1, n_keys, row);
      }
  }

  // Whether this tile's last vector has lanes behind the last key.
  bool ragged() const { return n_keys < tile; }

 private:
  void read_side(const BiasedRows& rows, int64_t o, int64_t width, int64_t padded, T* out) const {
    widen_rows(rows, item->bag, head(o), first_key, n_keys, width, padded, T(1), out);
    std::memset(out + n_keys * padded, 0, (tile - n_keys) * padded * sizeof(T));
  }

  // [tile, width] to [width, tile].
  void turn(const T* rows, int64_t width, T* columns) const {
    if constexpr (std::is_same_v<T, float>) {
      transpose(rows, width, tile, width, columns, tile);
    } else {
      for (int64_t j = 0; j < tile; ++j)
        for (int64_t d = 0; d < width; ++d) columns[d * tile + j] = rows[j * width + d];
    }
  }
};

}  // namespace
}  // namespace survfuse
