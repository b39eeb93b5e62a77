// The products of panels.h on bf16 pairs with fp32 accumulation (AVX512-BF16, vdpbf16ps).
#pragma once

#include <immintrin.h>

#include "cpu/panels.h"
#include "cpu/products_bf16.h"

namespace survfuse {
namespace {

struct PairPanels {
  using Element = uint16_t;
  static constexpr int kPairs = 2;  // the instruction multiplies two neighbours and adds both
  // rounding of the sums is nothing beside that of the factors
  static constexpr int64_t kTerms = 2048;
  static constexpr int kRows = 6, kVectors = 4;
  static constexpr int64_t kWidth = 64;

  static Element element(float value) { return float_to_bf16(value); }
  static void activate(Vec<float> a, Vec<float> b, Vec<float>* value, Vec<float>* code) {
    tanh_and_sigmoid(a, b, value, code);
  }
  static Vec<float> share(Vec<float> code) { return code; }
  static Vec<float> rest(Vec<float> code) { return 1.0f - code; }
  static Vec<float> wide(const uint16_t* p) {
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return (Vec<float>)_mm512_slli_epi32(words, 16);
  }
  static void narrow(Vec<float> v, uint16_t* out) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(out, &rounded, sizeof rounded);
  }

  template <int ROWS, bool FRESH>
  static void block(const uint16_t* const* rows, int64_t first, int64_t n_pairs,
                    const uint16_t* panel, float* c, int64_t ldc) {
    const uint16_t* a[ROWS];
    for (int r = 0; r < ROWS; ++r) a[r] = rows[r] + first;
    __m512 sum[ROWS][kVectors];
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_setzero_ps();
    for (int64_t k = 0; k < n_pairs; ++k) {
      __m512bh b[kVectors];
      for (int v = 0; v < kVectors; ++v)
        b[v] = (__m512bh)_mm512_loadu_si512(panel + k * 2 * kWidth + v * 32);
      for (int r = 0; r < ROWS; ++r) {
        int32_t pair;
        std::memcpy(&pair, a[r] + 2 * k, sizeof pair);
        const __m512bh as = (__m512bh)_mm512_set1_epi32(pair);
        for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], as, b[v]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < kVectors; ++v) {
        float* at = c + r * ldc + v * 16;
        _mm512_storeu_ps(at, FRESH ? sum[r][v] : _mm512_loadu_ps(at) + sum[r][v]);
      }
  }

  // One panel of B from n_k (an even number) of its rows; columns behind n_columns are zero.
  static void pack(const uint16_t* const* rows, int64_t n_k, int64_t first, int64_t n_columns,
                   uint16_t* panel) {
    for (int64_t k = 0; k < n_k; k += 2)
      for (int64_t half = 0; half < kWidth; half += 32) {
        const int64_t left = std::clamp<int64_t>(n_columns - half, 0, 32);
        const __mmask32 inside = static_cast<__mmask32>((uint64_t{1} << left) - 1);
        const __m512i one = _mm512_maskz_loadu_epi16(inside, rows[k] + first + half);
        const __m512i two = _mm512_maskz_loadu_epi16(inside, rows[k + 1] + first + half);
        uint16_t* out = panel + (k / 2 * kWidth + half) * 2;
        interleave(one, two, out);
      }
  }

  // One panel of B from kWidth of its columns, n_k (a multiple of kPanelAlign) long.
  static void pack_columns(const uint16_t* x, int64_t ldx, int64_t n_k, uint16_t* panel) {
    // moved as they are, two neighbours at a time
    transpose(reinterpret_cast<const float*>(x), ldx / 2, kWidth, n_k / 2,
              reinterpret_cast<float*>(panel), kWidth);
  }

  // [n, dim] to [dim, n], n even; dim is a multiple of kPanelAlign, ldo of the register and at
  // least n. room: turning_room(dim) elements.
  static void turn_rows(const uint16_t* x, int64_t ldx, int64_t n, int64_t dim, uint16_t* out,
                        int64_t ldo, uint16_t* room) {
    for (int64_t i = 0; i < n; i += 2 * kTurned) {
      const int64_t pairs = std::min(kTurned, (n - i) / 2);
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const uint16_t* row = x + (i + 2 * pair) * ldx;
        for (int64_t d = 0; d < dim; d += 32) {
          const __mmask32 inside = dim - d >= 32 ? ~__mmask32{0} : (__mmask32{1} << (dim - d)) - 1;
          interleave(_mm512_maskz_loadu_epi16(inside, row + d),
                     _mm512_maskz_loadu_epi16(inside, row + ldx + d),
                     room + (pair * round_up(dim, 32) + d) * 2);
        }
      }
      transpose(reinterpret_cast<const float*>(room), round_up(dim, 32), pairs, dim,
                reinterpret_cast<float*>(out + i), ldo / 2);
    }
  }
  static int64_t turning_room(int64_t dim) { return kTurned * round_up(dim, 32) * 2; }

 private:
  static constexpr int64_t kTurned = 16;  // pairs of rows turned together

  // (one[i], two[i]) side by side, i in natural order.
  static void interleave(__m512i one, __m512i two, uint16_t* out) {
    alignas(64) static const uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                  11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(one, low, two));
    _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi16(one, high, two));
  }
};

template <>
struct PanelsOf<PairProducts> {
  using type = PairPanels;
};

}  // namespace
}  // namespace survfuse
