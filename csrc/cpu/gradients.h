// From the gradient of a tile's row to that of the stored row.
#pragma once

#include <type_traits>

#include "cpu/vector.h"
#include "pool_bag.h"

namespace survfuse {
namespace {

template <class Acc, class Element>
inline Acc as_acc(Element e) {
  if constexpr (std::is_same_v<Element, uint16_t>)
    return bf16_to_float(e);
  else
    return e;
}

// In place: d_x_hat to d_x of a row that was x_hat = rstd * (x - mean).
template <class Acc, class Element>
void normalize_gradient(int64_t dim, const Element* x_hat, Acc rstd, Acc* line) {
  Acc first = 0, second = 0;
  for (int64_t d = 0; d < dim; ++d) {
    first += line[d];
    second += line[d] * as_acc<Acc>(x_hat[d]);
  }
  first /= dim;
  second /= dim;
  for (int64_t d = 0; d < dim; ++d)
    line[d] = rstd * (line[d] - first - as_acc<Acc>(x_hat[d]) * second);
}

// Writes a row at element `at`, or adds it; only accumulation types are added to.
template <class Acc>
void write_row(const Acc* line, int64_t dim, bool add, ElementType type, void* target, int64_t at) {
  if (type == ElementType::kBFloat16 || type == ElementType::kFloat16) {
    uint16_t* out = static_cast<uint16_t*>(target) + at;
    const bool bf16 = type == ElementType::kBFloat16;
    for (int64_t d = 0; d < dim; ++d)
      out[d] = bf16 ? float_to_bf16(static_cast<float>(line[d]))
                    : float_to_half(static_cast<float>(line[d]));
    return;
  }
  Acc* out = static_cast<Acc*>(target) + at;
  for (int64_t d = 0; d < dim; ++d) out[d] = add ? out[d] + line[d] : line[d];
}

}  // namespace
}  // namespace survfuse
