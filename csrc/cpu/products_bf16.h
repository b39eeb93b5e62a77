// The products of products.h on bf16 pairs with fp32 accumulation (AVX512-BF16, vdpbf16ps).
#pragma once

#include <immintrin.h>

#include "cpu/products.h"

namespace survfuse {
namespace {

struct PairProducts {
  using Element = uint16_t;
  using Weight = uint16_t;
  static constexpr int kAlign = 32;  // bf16 values in a register
  static constexpr int kPairs = 2;   // the instruction multiplies two neighbours and adds both
  static constexpr int kRows = 6, kItems = 4, kVectors = 2;

  static Weight weight(float value) { return float_to_bf16(value); }
  static Element element(float value) { return float_to_bf16(value); }

  static void elements(const float* line, float factor, uint16_t* out, int64_t dim) {
    const __m512 factors = _mm512_set1_ps(factor);
    for (int64_t d = 0; d < dim; d += 16) {
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(line + d) * factors);
      std::memcpy(out + d, &rounded, sizeof rounded);
    }
  }

  static __m512bh load_pairs(const uint16_t* p) {
    __m512bh v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }

  template <int ROWS, int ITEMS, bool AHEAD>
  static void dot_block(const uint16_t* a, int64_t lda, const uint16_t* x, int64_t ldx, int64_t dim,
                        float* s, int64_t lds) {
    __m512 sum[ROWS][ITEMS];
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < ITEMS; ++i) sum[r][i] = _mm512_setzero_ps();
    for (int64_t d = 0; d < dim; d += kAlign) {
      __m512bh xs[ITEMS];
      for (int i = 0; i < ITEMS; ++i) {
        xs[i] = load_pairs(x + i * ldx + d);
        if (AHEAD) __builtin_prefetch(x + (i + ITEMS) * ldx + d);
      }
      for (int r = 0; r < ROWS; ++r) {
        const __m512bh as = load_pairs(a + r * lda + d);
        for (int i = 0; i < ITEMS; ++i) sum[r][i] = _mm512_dpbf16_ps(sum[r][i], as, xs[i]);
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      Vec<float> sums[ITEMS];
      for (int i = 0; i < ITEMS; ++i) sums[i] = (Vec<float>)sum[r][i];
      horizontal_sums<float, ITEMS>(sums, s + r * lds);
    }
  }

  template <int ROWS, int VECTORS, bool FRESH>
  static void accumulate_block(const uint16_t* w, int64_t ldw, int64_t, const uint16_t* x,
                               int64_t ldx, int64_t n_k, float* c, int64_t ldc, const char* next,
                               int64_t next_stride) {
    // two rows of X interleaved: (x[k, d], x[k + 1, d]) side by side, d in natural order
    alignas(64) static const uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                  11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    __m512 sum[ROWS][2 * VECTORS];
    for (int m = 0; m < ROWS; ++m)
      for (int v = 0; v < 2 * VECTORS; ++v)
        sum[m][v] = FRESH ? _mm512_setzero_ps() : _mm512_loadu_ps(c + m * ldc + v * 16);
    for (int64_t k = 0; k < n_k; k += 2) {
      __m512bh xs[2 * VECTORS];
      for (int v = 0; v < VECTORS; ++v) {
        const __m512i first = _mm512_loadu_si512(x + k * ldx + v * kAlign);
        const __m512i second = _mm512_loadu_si512(x + (k + 1) * ldx + v * kAlign);
        xs[2 * v] = (__m512bh)_mm512_permutex2var_epi16(first, low, second);
        xs[2 * v + 1] = (__m512bh)_mm512_permutex2var_epi16(first, high, second);
        if (next) {
          __builtin_prefetch(next + k * next_stride + v * 64, 0, 2);
          __builtin_prefetch(next + (k + 1) * next_stride + v * 64, 0, 2);
        }
      }
      for (int m = 0; m < ROWS; ++m) {
        int32_t pair;
        std::memcpy(&pair, w + m * ldw + k, sizeof pair);
        const __m512bh ws = (__m512bh)_mm512_set1_epi32(pair);
        for (int v = 0; v < 2 * VECTORS; ++v) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], ws, xs[v]);
      }
    }
    for (int m = 0; m < ROWS; ++m)
      for (int v = 0; v < 2 * VECTORS; ++v) _mm512_storeu_ps(c + m * ldc + v * 16, sum[m][v]);
  }
};

}  // namespace
}  // namespace survfuse
