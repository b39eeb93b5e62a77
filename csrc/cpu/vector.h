// Vectors by the compiler's vector extension: one source for SSE2, AVX2, AVX-512 and NEON.
// Included only by the per-instruction-set files; everything is in an unnamed namespace, so that no
// inline function compiled for one instruction set can be linked into another.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifndef SURVFUSE_VECTOR_BYTES
#error "define SURVFUSE_VECTOR_BYTES before including vector.h"
#endif

namespace survfuse {
namespace {

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(SURVFUSE_VECTOR_BYTES)));
  typedef int32_t ints __attribute__((vector_size(SURVFUSE_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(SURVFUSE_VECTOR_BYTES)));
  typedef int64_t ints __attribute__((vector_size(SURVFUSE_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = SURVFUSE_VECTOR_BYTES / sizeof(T);

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}
template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}

template <class T>
inline T horizontal_sum(Vec<T> v) {
  T lane[kLanes<T>];
  std::memcpy(lane, &v, sizeof v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

typedef float Quad __attribute__((vector_size(16)));

// The sum of the register's four (two, one) quads, lane by lane.
inline Quad fold(Vec<float> v) {
  Quad part[sizeof v / sizeof(Quad)];
  std::memcpy(part, &v, sizeof v);
  Quad sum = part[0];
  for (unsigned i = 1; i < sizeof v / sizeof(Quad); ++i) sum += part[i];
  return sum;
}

// out[i] = horizontal sum of v[i]: four registers are transposed while they are added.
template <class T, int N>
inline void horizontal_sums(const Vec<T>* v, T* out) {
  if constexpr (std::is_same_v<T, float> && N == 4) {
    const Quad a = fold(v[0]), b = fold(v[1]), c = fold(v[2]), d = fold(v[3]);
    const Quad ab =
        __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Quad cd =
        __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    const Quad sum =
        __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    std::memcpy(out, &sum, sizeof sum);
  } else {
    for (int i = 0; i < N; ++i) out[i] = horizontal_sum<T>(v[i]);
  }
}

// out [dim, n], ldo apart, from x [n, dim]; dim is a multiple of 4, columns behind n are zeroed up
// to whole registers.
inline void transpose(const float* x, int64_t ldx, int64_t n, int64_t dim, float* out,
                      int64_t ldo) {
  const auto quad = [](const float* p) {
    Quad q;
    std::memcpy(&q, p, sizeof q);
    return q;
  };
  const auto put = [](float* p, Quad q) { std::memcpy(p, &q, sizeof q); };
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int64_t d = 0; d < dim; d += 4) {
      const float* from = x + i * ldx + d;
      const Quad a = quad(from), b = quad(from + ldx), c = quad(from + 2 * ldx);
      const Quad e = quad(from + 3 * ldx);
      const Quad ab = __builtin_shufflevector(a, b, 0, 4, 1, 5);
      const Quad AB = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const Quad ce = __builtin_shufflevector(c, e, 0, 4, 1, 5);
      const Quad CE = __builtin_shufflevector(c, e, 2, 6, 3, 7);
      float* to = out + d * ldo + i;
      put(to, __builtin_shufflevector(ab, ce, 0, 1, 4, 5));
      put(to + ldo, __builtin_shufflevector(ab, ce, 2, 3, 6, 7));
      put(to + 2 * ldo, __builtin_shufflevector(AB, CE, 0, 1, 4, 5));
      put(to + 3 * ldo, __builtin_shufflevector(AB, CE, 2, 3, 6, 7));
    }
  const int64_t padded = (n + kLanes<float> - 1) / kLanes<float> * kLanes<float>;
  for (int64_t d = 0; d < dim; ++d) {
    float* to = out + d * ldo;
    for (int64_t k = 0; k < n % 4; ++k) to[i + k] = x[(i + k) * ldx + d];
    std::fill(to + n, to + padded, 0.0f);
  }
}

// exp to 1 ulp for arguments up to 88; 0 below -87.3, where the result is no normal number.
// NaN stays NaN.
inline Vec<float> vector_exp(Vec<float> x) {
  typedef VectorOf<float>::ints Ints;
  const Vec<float> low = splat(-87.3f), high = splat(88.0f);
  const Ints underflow = x < low;
  x = x > high ? high : x;
  const Vec<float> clamped = x < low ? low : x;
  // round to nearest by adding 1.5 * 2^23
  const Vec<float> magic = splat(12582912.0f);
  const Vec<float> shifted = clamped * 1.44269504f + magic;
  const Vec<float> n = shifted - magic;
  Vec<float> r = clamped - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  Vec<float> y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  Ints bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127 << 23);
  Vec<float> power;
  std::memcpy(&power, &bits, sizeof power);
  y = y * power;
  return underflow ? Vec<float>{} : y;
}

inline Vec<double> vector_exp(Vec<double> x) {
  double lane[kLanes<double>];
  std::memcpy(lane, &x, sizeof x);
  for (double& value : lane) value = std::exp(value);
  std::memcpy(&x, lane, sizeof x);
  return x;
}

inline float bf16_to_float(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

inline uint16_t float_to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  // round to nearest even; a NaN keeps its quiet bit
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40;
  return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? quiet : rounded);
}

inline float half_to_float(uint16_t h) {
  // shift into place as if normal, then rescale by 2^112; infinities and NaNs keep an all-ones
  // exponent
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t body = static_cast<uint32_t>(h & 0x7FFF) << 13;
  float f;
  std::memcpy(&f, &body, sizeof f);
  f *= 5.192296858534828e33f;
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  if ((h & 0x7C00) == 0x7C00) bits |= 0x7F800000;
  bits |= sign;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

inline uint16_t float_to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) return sign | 0x7E00;
  if (bits >= 0x477FF000) return sign | 0x7C00;  // rounds to infinity
  if (bits < 0x38800000) {                       // subnormal: let the adder round
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3F000000));
  }
  bits += 0xC8000FFF + ((bits >> 13) & 1);
  return static_cast<uint16_t>(sign | (bits >> 13));
}

// One register of values read from p: of the same type, of another, or 16-bit by a function.
template <class T, class S>
inline Vec<T> widened(const S* p) {
  if constexpr (std::is_same_v<T, S>) {
    return load(p);
  } else {
    Vec<T> v;
    for (int i = 0; i < kLanes<T>; ++i) v[i] = static_cast<T>(p[i]);
    return v;
  }
}
template <class T>
inline Vec<T> widened(const uint16_t* p, float (*convert)(uint16_t)) {
  T lane[kLanes<T>];
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = convert(p[i]);
  return load(lane);
}

}  // namespace
}  // namespace survfuse
