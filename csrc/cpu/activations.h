// tanh, the logistic function and logarithms on vectors.
#pragma once

#include <limits>

#include "cpu/vector.h"

namespace survfuse {
namespace {

// To 2 ulp. Near 0, where 1 - 2 / (exp(2x) + 1) would lose digits, by a polynomial (Cephes tanhf).
inline Vec<float> vector_tanh(Vec<float> x) {
  const Vec<float> size = x < 0 ? -x : x;
  const Vec<float> far = 1.0f - 2.0f / (vector_exp(size + size) + 1.0f);
  const Vec<float> z = x * x;
  Vec<float> p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Vec<float> near = x + x * z * p;
  return size < 0.625f ? near : x < 0 ? -far : far;
}

// Numerator and denominator of tanh, within 4e-7 of their quotient: minimax fit of degree 9 over 8.
inline void tanh_fraction(Vec<float> x, Vec<float>* above, Vec<float>* below) {
  const Vec<float> most = splat(7.9f);
  x = x > most ? most : x < -most ? -most : x;
  const Vec<float> z = x * x;
  Vec<float> p = splat(1.542798990e-8f), q = splat(8.598787227e-7f);
  p = p * z + 2.202325797e-5f;
  q = q * z + 3.423651857e-4f;
  p = p * z + 3.578992838e-3f;
  q = q * z + 2.619224107e-2f;
  p = p * z + 1.345062127e-1f;
  q = q * z + 4.678394927e-1f;
  *above = x * (p * z + 1.0f);
  *below = q * z + 1.0f;
}

// tanh(a) and the logistic function of b within 4e-7, by one division. Where the latter is as
// small as that, exp would be more exact: this is for numbers that are rounded to 16 bits.
inline void tanh_and_sigmoid(Vec<float> a, Vec<float> b, Vec<float>* value, Vec<float>* share) {
  Vec<float> above_a, below_a, above_b, below_b;
  tanh_fraction(a, &above_a, &below_a);
  tanh_fraction(b * 0.5f, &above_b, &below_b);
  const Vec<float> inverse = 1.0f / (below_a * below_b);
  *value = above_a * inverse * below_b;
  *share = above_b * inverse * below_a * 0.5f + 0.5f;
}

inline Vec<double> vector_tanh(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::tanh(x[i]);
  return x;
}

// The logistic function y as the smaller of y and 1 - y, the latter negative: the derivative
// y (1 - y) keeps all its digits where y is close to 1.
template <class T>
inline Vec<T> sigmoid_code(Vec<T> x) {
  const Vec<T> size = x < 0 ? -x : x;
  const Vec<T> e = vector_exp(-size);
  Vec<T> less = e / (T(1) + e);
  const Vec<T> least = splat(std::numeric_limits<T>::min());
  less = less < least ? least : less;  // never 0, which has no sign
  return x < 0 ? less : -less;
}

// log(1 + x) for x >= 0, to 2 ulp. Infinity and NaN stay what they are.
inline Vec<float> vector_log1p(Vec<float> x) {
  typedef VectorOf<float>::ints Ints;
  const Vec<float> u = x + 1.0f;
  // what the sum lost
  const Vec<float> lost = x < 1.0f ? x - (u - 1.0f) : 1.0f - (u - x);
  // u = 2^k m, m from sqrt(1/2) to sqrt(2)
  Ints bits;
  std::memcpy(&bits, &u, sizeof bits);
  const Ints k = (bits - 0x3f3504f3) >> 23;
  const Ints m_bits = bits - (k << 23), inverse_bits = (127 - k) << 23;
  Vec<float> m, inverse;
  std::memcpy(&m, &m_bits, sizeof m);
  std::memcpy(&inverse, &inverse_bits, sizeof inverse);
  const Vec<float> n = __builtin_convertvector(k, Vec<float>);
  const Ints small = k == 0;
  const Vec<float> f = small ? x : (m - 1.0f) + lost * inverse;
  // Cephes logf
  const Vec<float> z = f * f;
  Vec<float> p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  Vec<float> y = f * z * p - n * 2.12194440e-4f;
  y = f + (y - z * 0.5f) + n * 0.693359375f;
  return x < std::numeric_limits<float>::infinity() ? y : x;
}

inline Vec<double> vector_log1p(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::log1p(x[i]);
  return x;
}

}  // namespace
}  // namespace survfuse
