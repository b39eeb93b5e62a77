// The table of position_biased_attention on strips of pairs: bilinear in the signed log.
#pragma once

#include "cpu/position_bias_mlp.h"

namespace survfuse {
namespace {

template <class T>
struct BiasTable {
  static constexpr int64_t kS = kStrip<T>;

  int64_t n_out, n, max_strips;
  const T* table;  // [O, n, n]
  T reach[2], per_cell[2];
  int32_t* corner;  // [strips, kS] the node of the lower corner
  T* fraction;      // [strips, 2, kS] the place within the cell

  BiasTable(const BiasedParams& in, int64_t strips)
      : n_out(heads_of_group(in)),
        n(in.table_size),
        max_strips(strips),
        table(static_cast<const T*>(in.parameters)) {
    for (int axis = 0; axis < 2; ++axis) {
      // scratch is measured without an address
      reach[axis] = in.workspace ? static_cast<const T*>(in.reach)[axis] : T(1);
      per_cell[axis] = static_cast<T>(n - 1) / (T(2) * reach[axis]);
    }
  }

  void lay_out(Arena& arena) {
    corner = arena.take<int32_t>(max_strips * kS);
    fraction = arena.take<T>(max_strips * 2 * kS);
  }

  // values [O, kS] at u [2, kS]; what the gradient needs is kept under the strip's number.
  void evaluate(int64_t strip, const T* u, T* values) const {
    int32_t* at = corner + strip * kS;
    T *fx = fraction + strip * 2 * kS, *fy = fx + kS;
    place(u, at, fx, fy);
    for (int64_t o = 0; o < n_out; ++o) {
      T nodes[4][kS];
      gather(table + o * n * n, at, nodes);
      for (int64_t i = 0; i < kS; i += kLanes<T>) {
        const Vec<T> x = load(fx + i), y = load(fy + i);
        const Vec<T> low = load(nodes[0] + i) * (T(1) - y) + load(nodes[1] + i) * y;
        const Vec<T> high = load(nodes[2] + i) * (T(1) - y) + load(nodes[3] + i) * y;
        store(values + o * kS + i, low * (T(1) - x) + high * x);
      }
    }
  }

  // Adds to the table's gradient, unless null, and writes d_u [strips, 2, kS], unless null.
  void differentiate(int64_t n_strips, const T* u, const T* d_values, T* d_table, T* d_u) const {
    for (int64_t s = 0; s < n_strips; ++s) {
      const T* d = d_values + s * n_out * kS;
      if (d_u) slopes(s, u + s * 2 * kS, d, d_u + s * 2 * kS);
      for (int64_t o = 0; d_table && o < n_out; ++o) scatter(s, d + o * kS, d_table + o * n * n);
    }
  }

 private:
  void place(const T* u, int32_t* at, T* fx, T* fy) const {
    T* const fractions[2] = {fx, fy};
    const T most = static_cast<T>(n - 2);
    for (int axis = 0; axis < 2; ++axis) {
      const T far = reach[axis], cells = per_cell[axis];
      for (int64_t i = 0; i < kS; ++i) {
        const T x = u[axis * kS + i];
        const T where = ((x > far ? far : x < -far ? -far : x) + far) * cells;
        // NaN stays in the fraction; as an index it must be one
        const T lowest = where > 0 ? where : T(0);
        const int32_t cell = static_cast<int32_t>(lowest > most ? most : lowest);
        fractions[axis][i] = where - static_cast<T>(cell);
        at[i] = axis == 0 ? cell * static_cast<int32_t>(n) : at[i] + cell;
      }
    }
  }

  void gather(const T* from, const int32_t* at, T (*nodes)[kS]) const {
    for (int64_t i = 0; i < kS; ++i) {
      const T* node = from + at[i];
      nodes[0][i] = node[0];
      nodes[1][i] = node[1];
      nodes[2][i] = node[n];
      nodes[3][i] = node[n + 1];
    }
  }

  void slopes(int64_t strip, const T* u, const T* d, T* d_u) const {
    const T *fx = fraction + strip * 2 * kS, *fy = fx + kS;
    std::memset(d_u, 0, 2 * kS * sizeof(T));
    for (int64_t o = 0; o < n_out; ++o) {
      T nodes[4][kS];
      gather(table + o * n * n, corner + strip * kS, nodes);
      for (int64_t i = 0; i < kS; i += kLanes<T>) {
        const Vec<T> x = load(fx + i), y = load(fy + i), ds = load(d + o * kS + i);
        const Vec<T> a = load(nodes[0] + i), b = load(nodes[1] + i);
        const Vec<T> c = load(nodes[2] + i), e = load(nodes[3] + i);
        const Vec<T> along_x = (c - a) * (T(1) - y) + (e - b) * y;
        const Vec<T> along_y = (b - a) * (T(1) - x) + (e - c) * x;
        store(d_u + i, load(d_u + i) + ds * along_x * per_cell[0]);
        store(d_u + kS + i, load(d_u + kS + i) + ds * along_y * per_cell[1]);
      }
    }
    for (int axis = 0; axis < 2; ++axis)
      for (int64_t i = 0; i < kS; i += kLanes<T>) {
        const Vec<T> x = load(u + axis * kS + i), far = splat(reach[axis]);
        T* to = d_u + axis * kS + i;
        store(to, x > far ? Vec<T>{} : x < -far ? Vec<T>{} : load(to));
      }
  }

  void scatter(int64_t strip, const T* d, T* d_nodes) const {
    const int32_t* at = corner + strip * kS;
    const T *fx = fraction + strip * 2 * kS, *fy = fx + kS;
    for (int64_t i = 0; i < kS; ++i) {
      T* node = d_nodes + at[i];
      const T high = d[i] * fx[i], low = d[i] - high;
      const T low_y = low * fy[i], high_y = high * fy[i];
      node[0] += low - low_y;
      node[1] += low_y;
      node[n] += high - high_y;
      node[n + 1] += high_y;
    }
  }
};

}  // namespace
}  // namespace survfuse
