// Large matrix products: C[m, n] = or += sum_k A[m, k] B[k, n].
// A is rows by their addresses. B is panels of kWidth columns, packed as [k /
// kPairs][column][pair], so that one strip of kRows rows keeps a strip of C in registers while a
// panel comes from L2.
#pragma once

#include <algorithm>

#include "cpu/activations.h"
#include "cpu/arena.h"
#include "cpu/products.h"

namespace survfuse {
namespace {

// Columns of what is packed into panels are padded with zeros to a multiple of this.
constexpr int64_t kPanelAlign = 8;

// [n, dim] to [dim, n]; dim is a multiple of 4.
template <class T>
inline void turn(const T* x, int64_t ldx, int64_t n, int64_t dim, T* out, int64_t ldo) {
  if constexpr (std::is_same_v<T, float>) {
    transpose(x, ldx, n, dim, out, ldo);
  } else {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t d = 0; d < dim; ++d) out[d * ldo + i] = x[i * ldx + d];
  }
}

template <class T>
struct VectorPanels {
  using Element = T;
  static constexpr int kPairs = 1;
  // terms added one after the other: rounding grows with their number
  static constexpr int64_t kTerms = 256;
#if SURVFUSE_VECTOR_BYTES == 64
  static constexpr int kRows = 6, kVectors = 4;  // 24 of 32 registers accumulate
#else
  static constexpr int kRows = 6, kVectors = 2;  // 12 of 16
#endif
  static constexpr int64_t kWidth = kVectors * kLanes<T>;

  static Element element(T value) { return value; }
  // tanh, and the logistic function as `share` and `rest` take it.
  static void activate(Vec<T> a, Vec<T> b, Vec<T>* value, Vec<T>* code) {
    *value = vector_tanh(a);
    *code = sigmoid_code<T>(b);
  }
  static Vec<T> share(Vec<T> code) { return code < 0 ? T(1) + code : code; }
  static Vec<T> rest(Vec<T> code) { return code < 0 ? -code : T(1) - code; }
  static Vec<T> wide(const T* p) { return load(p); }
  static void narrow(Vec<T> v, T* out) { store(out, v); }

  template <int ROWS, bool FRESH>
  static void block(const T* const* rows, int64_t first, int64_t n_k, const T* panel, T* c,
                    int64_t ldc) {
    const T* a[ROWS];
    for (int r = 0; r < ROWS; ++r) a[r] = rows[r] + first;
    Vec<T> sum[ROWS][kVectors] = {};
    for (int64_t k = 0; k < n_k; ++k) {
      Vec<T> b[kVectors];
      for (int v = 0; v < kVectors; ++v) b[v] = load(panel + k * kWidth + v * kLanes<T>);
      for (int r = 0; r < ROWS; ++r) {
        const Vec<T> as = splat(a[r][k]);
        for (int v = 0; v < kVectors; ++v) sum[r][v] += as * b[v];
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < kVectors; ++v) {
        T* at = c + r * ldc + v * kLanes<T>;
        store(at, FRESH ? sum[r][v] : load(at) + sum[r][v]);
      }
  }

  // One panel of B from n_k of its rows; columns behind n_columns are zero.
  static void pack(const T* const* rows, int64_t n_k, int64_t first, int64_t n_columns, T* panel) {
    for (int64_t k = 0; k < n_k; ++k) {
      T* out = panel + k * kWidth;
      std::memcpy(out, rows[k] + first, n_columns * sizeof(T));
      std::fill(out + n_columns, out + kWidth, T(0));
    }
  }

  // One panel of B from kWidth of its columns, n_k (a multiple of kPanelAlign) long.
  static void pack_columns(const T* x, int64_t ldx, int64_t n_k, T* panel) {
    turn(x, ldx, kWidth, n_k, panel, kWidth);
  }

  // [n, dim] to [dim, n]; dim is a multiple of kPanelAlign, ldo of the register and at least n.
  static void turn_rows(const T* x, int64_t ldx, int64_t n, int64_t dim, T* out, int64_t ldo, T*) {
    turn(x, ldx, n, dim, out, ldo);
  }
  static int64_t turning_room(int64_t) { return 0; }
};

// The panels of the same elements as the small products P.
template <class P>
struct PanelsOf;
template <class T>
struct PanelsOf<VectorProducts<T>> {
  using type = VectorPanels<T>;
};

// c [n_rows, kWidth n_panels] = or += a . panels, panel_size elements apart. Rows of `a` hold n_k
// elements, zeros behind them up to a multiple of kPairs.
template <class P, bool FRESH, class Acc>
void multiply_panels(const typename P::Element* const* a, int64_t n_rows, int64_t n_k,
                     const typename P::Element* panels, int64_t panel_size, int64_t n_panels,
                     Acc* c, int64_t ldc) {
  const int64_t steps = (n_k + P::kPairs - 1) / P::kPairs;
  const int64_t pieces = (n_k + P::kTerms - 1) / P::kTerms;
  const int64_t strips = (n_rows + P::kRows - 1) / P::kRows;
  for (int64_t panel = 0; panel < n_panels; ++panel)
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t from = steps * piece / pieces, to = steps * (piece + 1) / pieces;
      const typename P::Element* b = panels + panel * panel_size + from * P::kPairs * P::kWidth;
      for (int64_t r = 0, strip = 0, height; r < n_rows; r += height, ++strip) {
        // of nearly equal height: 7 rows are 4 + 3, not 6 + 1
        height = (n_rows - r + strips - strip - 1) / (strips - strip);
        Acc* out = c + r * ldc + panel * P::kWidth;
        // what the next strip adds to is not in the nearest cache where C is large
        for (int64_t i = r + height; (!FRESH || piece) && i < r + 2 * height && i < n_rows; ++i)
          for (int64_t at = 0; at < P::kWidth; at += 64 / sizeof(Acc))
            __builtin_prefetch(c + i * ldc + panel * P::kWidth + at, 1);
        with_constant<P::kRows>(static_cast<int>(height), [&](auto rows) {
          if (FRESH && piece == 0)
            P::template block<rows(), true>(a + r, from * P::kPairs, to - from, b, out, ldc);
          else
            P::template block<rows(), false>(a + r, from * P::kPairs, to - from, b, out, ldc);
        });
      }
    }
}

}  // namespace
}  // namespace survfuse
