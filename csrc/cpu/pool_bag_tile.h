// One tile of a bag: rows brought to the type the products take, excluded rows zeroed, normalised.
#pragma once

#include "cpu/products.h"
#include "pool_bag.h"

namespace survfuse {
namespace {

constexpr int64_t kTileBytes = 192 * 1024;  // a tile is read two or three times: keep it in L2
constexpr int64_t kMaxTileRows = 64;

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

template <class Acc>
inline bool excludes(const Acc* bias, int64_t row) {
  return bias && bias[row] == -static_cast<Acc>(INFINITY);
}

template <class P, class Acc>
struct TileReader {
  using Element = typename P::Element;

  const PoolBagParams& in;
  int64_t dim, ld, tile_rows;  // padded row length, leading dimension and height of the buffer

  explicit TileReader(const PoolBagParams& params)
      : in(params),
        dim(round_up(params.dim, P::kAlign)),
        // one more cache line per row: rows 4 KB apart would all fall into one set
        ld(dim + 64 / static_cast<int64_t>(sizeof(Element))) {
    const int64_t fit = kTileBytes / (ld * static_cast<int64_t>(sizeof(Element)));
    tile_rows = fit < 8 ? 8 : fit > kMaxTileRows ? kMaxTileRows : fit / 8 * 8;
  }

  // Sets x to n rows from `row` on, ldx apart; in place where the bag can be used as it lies.
  // rstd_out: [n] or null, the factor of the normalisation (0 for an excluded row).
  void read(int64_t row, int64_t n, Element* buffer, Acc* line, Acc* rstd_out, const Element** x,
            int64_t* ldx) const {
    if (usable_in_place(row, n)) {
      *x = static_cast<const Element*>(in.bag) + row * in.bag_stride;
      *ldx = in.bag_stride;
      return;
    }
    const Acc* bias = static_cast<const Acc*>(in.bias);
    for (int64_t i = 0; i < n; ++i) {
      Element* out = buffer + i * ld;
      Acc rstd = 0;
      if (excludes(bias, row + i)) {
        std::memset(out, 0, dim * sizeof(Element));
      } else {
        convert(row + i, line);
        if (in.normalize) rstd = normalize(row + i, line);
        for (int64_t d = 0; d < dim; ++d) out[d] = P::element(line[d]);
      }
      if (rstd_out) rstd_out[i] = rstd;
    }
    for (int64_t i = n; i < round_up(n, P::kPairs); ++i)
      std::memset(buffer + i * ld, 0, dim * sizeof(Element));
    *x = buffer;
    *ldx = ld;
  }

 private:
  bool usable_in_place(int64_t row, int64_t n) const {
    constexpr ElementType kSame = std::is_same_v<Element, float>    ? ElementType::kFloat32
                                  : std::is_same_v<Element, double> ? ElementType::kFloat64
                                                                    : ElementType::kBFloat16;
    // many rows of queries walk a tile many times, which pays for a copy with a good stride
    if (in.bag_type != kSame || in.normalize || dim != in.dim || n % P::kPairs || in.n_rows > 32)
      return false;
    const Acc* bias = static_cast<const Acc*>(in.bias);
    for (int64_t i = 0; bias && i < n; ++i)
      if (excludes(bias, row + i)) return false;
    return true;
  }

  void convert(int64_t row, Acc* line) const {
    const int64_t at = row * in.bag_stride;
    switch (in.bag_type) {
      case ElementType::kFloat32: {
        const float* source = static_cast<const float*>(in.bag) + at;
        for (int64_t d = 0; d < in.dim; ++d) line[d] = source[d];
        break;
      }
      case ElementType::kFloat64: {
        const double* source = static_cast<const double*>(in.bag) + at;
        for (int64_t d = 0; d < in.dim; ++d) line[d] = static_cast<Acc>(source[d]);
        break;
      }
      case ElementType::kBFloat16: {
        const uint16_t* source = static_cast<const uint16_t*>(in.bag) + at;
        for (int64_t d = 0; d < in.dim; ++d) line[d] = bf16_to_float(source[d]);
        break;
      }
      case ElementType::kFloat16: {
        const uint16_t* source = static_cast<const uint16_t*>(in.bag) + at;
        for (int64_t d = 0; d < in.dim; ++d) line[d] = half_to_float(source[d]);
        break;
      }
    }
    for (int64_t d = in.dim; d < dim; ++d) line[d] = 0;
  }

  // Subtracts the mean before squaring, so that |mean| >> std loses nothing.
  Acc normalize(int64_t row, Acc* line) const {
    Acc mean, rstd;
    if (in.mean) {
      mean = static_cast<const Acc*>(in.mean)[row];
      rstd = static_cast<const Acc*>(in.rstd)[row];
      for (int64_t d = 0; d < in.dim; ++d) line[d] -= mean;
    } else {
      mean = sum(line, [](Vec<Acc> v) { return v; }) / in.dim;
      for (int64_t d = 0; d < in.dim; ++d) line[d] -= mean;
      const Acc variance = sum(line, [](Vec<Acc> v) { return v * v; }) / in.dim;
      rstd = 1 / std::sqrt(variance + static_cast<Acc>(in.eps));
    }
    for (int64_t d = 0; d < in.dim; ++d) line[d] *= rstd;
    return rstd;
  }

  template <class Fn>
  Acc sum(const Acc* line, const Fn& fn) const {
    Vec<Acc> total = {};
    for (int64_t d = 0; d < dim; d += kLanes<Acc>) total += fn(load(line + d));
    return horizontal_sum<Acc>(total);
  }
};

}  // namespace
}  // namespace survfuse
