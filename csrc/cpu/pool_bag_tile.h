// One tile of a bag: rows brought to the type the products take, excluded rows zeroed, normalised.
#pragma once

#include "cpu/arena.h"
#include "cpu/products.h"
#include "pool_bag.h"

namespace survfuse {
namespace {

constexpr int64_t kTileBytes = 192 * 1024;  // a tile is read two or three times: keep it in L2
constexpr int64_t kMaxTileRows = 64;

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
        rstd = in.normalize ? center(row + i, line) : Acc(1);
        P::elements(line, rstd, out, dim);
      }
      if (rstd_out) rstd_out[i] = rstd;
    }
    for (int64_t i = n; i < round_up(n, P::kPairs); ++i)
      std::memset(buffer + i * ld, 0, dim * sizeof(Element));
    *x = buffer;
    *ldx = ld;
  }

  // The stored rows from `row` on, to be fetched early; nothing where none is left.
  Prefetch ahead(int64_t row, int64_t n_left) const {
    if (n_left <= 0) return {};
    const int64_t size = in.bag_type == ElementType::kFloat64   ? 8
                         : in.bag_type == ElementType::kFloat32 ? 4
                                                                : 2;
    const char* base = static_cast<const char*>(in.bag);
    return {base + row * in.bag_stride * size, in.bag_stride * size, size};
  }

  // One stored row in the type of accumulation, padded by zeros.
  void convert(int64_t row, Acc* line) const {
    const int64_t at = row * in.bag_stride;
    const int64_t whole = in.dim / kLanes<Acc> * kLanes<Acc>;
    const auto each = [&](const auto* source, const auto& widen) {
      for (int64_t d = 0; d < whole; d += kLanes<Acc>) {
        // two rows ahead: the processor's own prefetcher stops at the end of a page
        __builtin_prefetch(source + d + 2 * in.bag_stride);
        store(line + d, widen(source + d));
      }
      for (int64_t d = whole; d < in.dim; ++d) {
        std::remove_cv_t<std::remove_reference_t<decltype(*source)>> last[kLanes<Acc>] = {};
        last[0] = source[d];
        line[d] = widen(last)[0];
      }
    };
    switch (in.bag_type) {
      case ElementType::kFloat32:
        each(static_cast<const float*>(in.bag) + at,
             [](const float* p) { return widened<Acc>(p); });
        break;
      case ElementType::kFloat64:
        each(static_cast<const double*>(in.bag) + at,
             [](const double* p) { return widened<Acc>(p); });
        break;
      case ElementType::kBFloat16:
        each(static_cast<const uint16_t*>(in.bag) + at,
             [](const uint16_t* p) { return widened<Acc>(p, bf16_to_float); });
        break;
      case ElementType::kFloat16:
        each(static_cast<const uint16_t*>(in.bag) + at,
             [](const uint16_t* p) { return widened<Acc>(p, half_to_float); });
        break;
    }
    for (int64_t d = in.dim; d < dim; ++d) line[d] = 0;
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

  // Subtracts the mean, before squaring, so that |mean| >> std loses nothing; returns the factor.
  Acc center(int64_t row, Acc* line) const {
    if (in.mean) {
      subtract(static_cast<const Acc*>(in.mean)[row], line);
      return static_cast<const Acc*>(in.rstd)[row];
    }
    subtract(sum(line, [](Vec<Acc> v) { return v; }) / in.dim, line);
    const Acc variance = sum(line, [](Vec<Acc> v) { return v * v; }) / in.dim;
    return 1 / std::sqrt(variance + static_cast<Acc>(in.eps));
  }

  void subtract(Acc mean, Acc* line) const {
    const Vec<Acc> means = splat(mean);
    for (int64_t d = 0; d < dim; d += kLanes<Acc>) store(line + d, load(line + d) - means);
    for (int64_t d = in.dim; d < dim; ++d) line[d] = 0;
  }

  template <class Fn>
  Acc sum(const Acc* line, const Fn& fn) const {
    // four sums side by side: one alone would wait for its own last addition
    constexpr int64_t kStep = kLanes<Acc>;
    Vec<Acc> total[4] = {};
    int64_t d = 0;
    for (; d + 4 * kStep <= dim; d += 4 * kStep)
      for (int i = 0; i < 4; ++i) total[i] += fn(load(line + d + i * kStep));
    for (; d < dim; d += kStep) total[0] += fn(load(line + d));
    return horizontal_sum<Acc>((total[0] + total[1]) + (total[2] + total[3]));
  }
};

}  // namespace
}  // namespace survfuse
