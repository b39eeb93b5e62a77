// The two small matrix products of streaming attention, on vectors of T.
//   dots:        S[r, i] = sum_d A[r, d] X[i, d]
//   accumulate:  C[m, d] += sum_k W[m, k] X[k, d], or = for fresh memory
// Leading dimensions are in elements; d runs to `dim`, a multiple of the vector length.
#pragma once

#include "cpu/vector.h"

namespace survfuse {
namespace {

// Rows that will be wanted next: fetched into the cache while arithmetic keeps the core busy.
struct Prefetch {
  const char* rows = nullptr;  // null: nothing
  int64_t row_bytes = 0;       // from one row to the next
  int64_t element_bytes = 0;
};

template <class T>
struct VectorProducts {
  using Element = T;  // of A and X
  using Weight = T;   // of W
  static constexpr int kAlign = kLanes<T>;
  static constexpr int kPairs = 1;  // rows of X are taken one by one
  static constexpr int kVectorBytes = SURVFUSE_VECTOR_BYTES;
#if SURVFUSE_VECTOR_BYTES == 64
  static constexpr int kRows = 6, kItems = 4, kVectors = 4;  // 24 of 32 registers accumulate
#else
  static constexpr int kRows = 3, kItems = 3, kVectors = 3;  // 9 of 16
#endif

  static Weight weight(T value) { return value; }
  static Element element(T value) { return value; }

  // out = line * factor, whole registers.
  static void elements(const T* line, T factor, T* out, int64_t dim) {
    const Vec<T> factors = splat(factor);
    for (int64_t d = 0; d < dim; d += kLanes<T>) store(out + d, load(line + d) * factors);
  }

  // AHEAD: the rows behind these are about to come from memory, so ask for them now. Processors
  // prefetch within a page, and here a row often is one.
  template <int ROWS, int ITEMS, bool AHEAD>
  static void dot_block(const T* a, int64_t lda, const T* x, int64_t ldx, int64_t dim, T* s,
                        int64_t lds) {
    Vec<T> sum[ROWS][ITEMS] = {};
    for (int64_t d = 0; d < dim; d += kLanes<T>) {
      Vec<T> xs[ITEMS];
      for (int i = 0; i < ITEMS; ++i) {
        xs[i] = load(x + i * ldx + d);
        if (AHEAD) __builtin_prefetch(x + (i + ITEMS) * ldx + d);
      }
      for (int r = 0; r < ROWS; ++r) {
        const Vec<T> as = load(a + r * lda + d);
        for (int i = 0; i < ITEMS; ++i) sum[r][i] += as * xs[i];
      }
    }
    for (int r = 0; r < ROWS; ++r) horizontal_sums<T, ITEMS>(sum[r], s + r * lds);
  }

  template <int ROWS, int VECTORS, bool FRESH>
  static void accumulate_block(const T* w, int64_t ldw, int64_t w_step, const T* x, int64_t ldx,
                               int64_t n_k, T* c, int64_t ldc, const char* next,
                               int64_t next_stride) {
    Vec<T> sum[ROWS][VECTORS];
    for (int m = 0; m < ROWS; ++m)
      for (int v = 0; v < VECTORS; ++v)
        sum[m][v] = FRESH ? Vec<T>{} : load(c + m * ldc + v * kLanes<T>);
    for (int64_t k = 0; k < n_k; ++k) {
      Vec<T> xs[VECTORS];
      for (int v = 0; v < VECTORS; ++v) {
        xs[v] = load(x + k * ldx + v * kLanes<T>);
        if (next) __builtin_prefetch(next + k * next_stride + v * kVectorBytes, 0, 2);
      }
      for (int m = 0; m < ROWS; ++m) {
        const Vec<T> ws = splat(w[m * ldw + k * w_step]);
        for (int v = 0; v < VECTORS; ++v) sum[m][v] += ws * xs[v];
      }
    }
    for (int m = 0; m < ROWS; ++m)
      for (int v = 0; v < VECTORS; ++v) store(c + m * ldc + v * kLanes<T>, sum[m][v]);
  }
};

// Calls body with the compile-time constant N for a runtime n in [1, MAX].
template <int MAX, class Body>
inline void with_constant(int n, const Body& body) {
  if constexpr (MAX > 1) {
    if (n < MAX) return with_constant<MAX - 1>(n, body);
  }
  body(std::integral_constant<int, MAX>{});
}

// S[r, i] for r < n_rows, i < n_items. streamed: X comes from memory, not from a buffer.
template <class P, class S>
void dots(const typename P::Element* a, int64_t lda, int64_t n_rows, const typename P::Element* x,
          int64_t ldx, int64_t n_items, int64_t dim, S* s, int64_t lds, bool streamed = false) {
  const int64_t blocks = (n_rows + P::kRows - 1) / P::kRows;
  for (int64_t block = 0, r = 0; block < blocks; ++block) {
    // blocks of nearly equal height: 7 rows are 4 + 3, not 6 + 1
    const int height = static_cast<int>((n_rows - r + blocks - block - 1) / (blocks - block));
    with_constant<P::kRows>(height, [&](auto rows) {
      constexpr int kRows = rows();
      const auto items = [&](auto n, auto ahead, int64_t i) {
        P::template dot_block<kRows, n(), ahead()>(a + r * lda, lda, x + i * ldx, ldx, dim,
                                                   s + r * lds + i, lds);
      };
      using Some = std::integral_constant<int, P::kItems>;
      using One = std::integral_constant<int, 1>;
      int64_t i = 0;
      // once per item is enough
      if (streamed && block == 0)
        for (; i + P::kItems <= n_items; i += P::kItems) items(Some{}, std::true_type{}, i);
      for (; i + P::kItems <= n_items; i += P::kItems) items(Some{}, std::false_type{}, i);
      for (; i < n_items; ++i) items(One{}, std::false_type{}, i);
    });
    r += height;
  }
}

// C[m, :dim] += W[m, :n_k] X[:n_k, :dim], or = if FRESH; n_k is a multiple of P::kPairs.
// w_step: from one k to the next; only 1 where rows are taken in pairs.
template <class P, bool FRESH = false, class C>
void accumulate(const typename P::Weight* w, int64_t ldw, int64_t n_rows,
                const typename P::Element* x, int64_t ldx, int64_t n_k, int64_t dim, C* c,
                int64_t ldc, Prefetch next = {}, int64_t w_step = 1) {
  constexpr int64_t kWide = P::kVectors * P::kAlign;
  const int64_t blocks = (n_rows + P::kRows - 1) / P::kRows;
  for (int64_t d = 0; d < dim;) {
    const bool wide = d + kWide <= dim;
    for (int64_t block = 0, m = 0; block < blocks; ++block) {
      const int height = static_cast<int>((n_rows - m + blocks - block - 1) / (blocks - block));
      // once per column is enough
      const char* ahead = block == 0 && next.rows ? next.rows + d * next.element_bytes : nullptr;
      with_constant<P::kRows>(height, [&](auto rows) {
        if (wide)
          P::template accumulate_block<rows(), P::kVectors, FRESH>(w + m * ldw, ldw, w_step, x + d,
                                                                   ldx, n_k, c + m * ldc + d, ldc,
                                                                   ahead, next.row_bytes);
        else
          P::template accumulate_block<rows(), 1, FRESH>(w + m * ldw, ldw, w_step, x + d, ldx, n_k,
                                                         c + m * ldc + d, ldc, ahead,
                                                         next.row_bytes);
      });
      m += height;
    }
    d += wide ? kWide : P::kAlign;
  }
}

}  // namespace
}  // namespace survfuse
