// Where the samples of one query and head lie: lanes are samples.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/arena.h"
#include "cpu/multi_scale_deformable_attention_plan.h"
#include "cpu/vector.h"

namespace survfuse {
namespace {

template <class T>
using Ints = typename VectorOf<T>::ints;
template <class T>
using Int = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;

template <class T>
inline Ints<T> load_ints(const Int<T>* p) {
  Ints<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
struct Pixels {
  Vec<T> x, y;
};

// x and y of a register of samples, of which the first `left` are there.
template <class T>
inline Pixels<T> load_points(const T* points, int64_t left) {
  constexpr int kN = kLanes<T>;
  T both[2 * kN] = {}, x[kN], y[kN];
  if (left >= kN)
    std::memcpy(both, points, sizeof both);
  else
    std::copy(points, points + 2 * left, both);
  for (int i = 0; i < kN; ++i) {
    x[i] = both[2 * i];
    y[i] = both[2 * i + 1];
  }
  return {load(x), load(y)};
}

template <class T>
inline Vec<T> load_first(const T* p, int64_t left, T behind = 0) {
  if (left >= kLanes<T>) return load(p);
  T values[kLanes<T>];
  std::fill(values, values + kLanes<T>, behind);
  std::copy(p, p + left, values);
  return load(values);
}

template <class T>
inline void store_first(T* p, Vec<T> v, int64_t left) {
  if (left >= kLanes<T>) return store(p, v);
  std::memcpy(p, &v, left * sizeof(T));
}

// The samples of levels [first, last) of one query and head; every array holds n of them, padded
// to whole registers.
template <class T>
struct DeformableSamples {
  // bits of `corners`
  static constexpr Int<T> kUpperLeft = 1, kUpperRight = 2, kLowerLeft = 4, kLowerRight = 8,
                          kAll = 15;

  int64_t first, n;
  T *width, *height;              // of the sample's level
  Int<T>*columns, *rows, *start;  // the same as whole numbers, and the level's first row
  T *origin_x, *origin_y;         // pixel = origin + point * step
  T *step_x, *step_y;
  Int<T>*upper_left, *corners;  // row of that corner, and which corners lie inside
  T *fraction_x, *fraction_y, *weight;
  T* share[4];  // of each corner, times the weight
  T* dot[4];    // backward: of each corner's pixel with d_out

  // Bytes taken; with a null base only counts.
  int64_t lay_out(const DeformableParams& in, int64_t first_level, int64_t last_level, char* base) {
    first = first_level * in.n_points;
    n = (last_level - first_level) * in.n_points;
    const int64_t padded = round_up(n, kLanes<T>);
    Arena arena{base};
    for (T** values :
         {&width, &height, &origin_x, &origin_y, &step_x, &step_y, &fraction_x, &fraction_y,
          &weight, &share[0], &share[1], &share[2], &share[3], &dot[0], &dot[1], &dot[2], &dot[3]})
      *values = arena.take<T>(padded);
    for (Int<T>** values : {&columns, &rows, &start, &upper_left, &corners})
      *values = arena.take<Int<T>>(padded);
    if (base) describe_levels(in, padded);
    return arena.used;
  }

  // Once per query: where points begin, and how far one unit of them goes.
  void set_reference(const DeformableParams& in, int64_t query) {
    const T* reference =
        static_cast<const T*>(in.reference) + query * in.n_levels * in.reference_dim;
    for (int64_t i = 0; i < n; ++i) {
      const T* at = reference + (first + i) / in.n_points * in.reference_dim;
      origin_x[i] = at[0] * width[i] - T(0.5);
      origin_y[i] = at[1] * height[i] - T(0.5);
      const bool box = in.reference_dim == 4;
      step_x[i] = box ? at[2] * width[i] * (T(0.5) / in.n_points) : T(1);
      step_y[i] = box ? at[3] * height[i] * (T(0.5) / in.n_points) : T(1);
    }
  }

  // From the points; the weights are set already.
  void locate(const T* points) {
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const Pixels<T> point = load_points(points + 2 * i, n - i);
      Vec<T> x = load(origin_x + i) + point.x * load(step_x + i);
      Vec<T> y = load(origin_y + i) + point.y * load(step_y + i);
      // false for NaN, which lies outside
      const Ints<T> inside =
          (x > T(-1)) & (x < load(width + i)) & (y > T(-1)) & (y < load(height + i));
      x = inside ? x : Vec<T>{};
      y = inside ? y : Vec<T>{};
      const Ints<T> left = floor(x), top = floor(y);
      x -= __builtin_convertvector(left, Vec<T>);
      y -= __builtin_convertvector(top, Vec<T>);
      const Ints<T> across = load_ints<T>(columns + i), down = load_ints<T>(rows + i);
      const Ints<T> has_left = (left >= 0) & (left < across), has_right = left + 1 < across;
      const Ints<T> has_top = (top >= 0) & (top < down) & inside;
      const Ints<T> has_bottom = (top + 1 < down) & inside;
      const Ints<T> found =
          (has_left & has_top & kUpperLeft) | (has_right & has_top & kUpperRight) |
          (has_left & has_bottom & kLowerLeft) | (has_right & has_bottom & kLowerRight);
      const Ints<T> row = load_ints<T>(start + i) + top * across + left;
      std::memcpy(corners + i, &found, sizeof found);
      std::memcpy(upper_left + i, &row, sizeof row);
      const Vec<T> w = load(weight + i), lower = y * w, upper = w - lower;
      store(share[0] + i, upper - upper * x);
      store(share[1] + i, upper * x);
      store(share[2] + i, lower - lower * x);
      store(share[3] + i, lower * x);
      store(fraction_x + i, x);
      store(fraction_y + i, y);
    }
  }

 private:
  static Ints<T> floor(Vec<T> x) {
    const Ints<T> towards_zero = __builtin_convertvector(x, Ints<T>);
    return towards_zero + (__builtin_convertvector(towards_zero, Vec<T>) > x);
  }

  void describe_levels(const DeformableParams& in, int64_t padded) {
    int64_t before = 0;
    for (int64_t level = 0; level * in.n_points < first; ++level)
      before += in.shapes[2 * level] * in.shapes[2 * level + 1];
    for (int64_t i = 0; i < padded; ++i) {
      // padding samples have no pixels
      const int64_t* shape = i < n ? in.shapes + (first + i) / in.n_points * 2 : nullptr;
      rows[i] = static_cast<Int<T>>(shape ? shape[0] : 0);
      columns[i] = static_cast<Int<T>>(shape ? shape[1] : 0);
      height[i] = static_cast<T>(rows[i]);
      width[i] = static_cast<T>(columns[i]);
      start[i] = static_cast<Int<T>>(before);
      if (shape && (i + 1) % in.n_points == 0) before += shape[0] * shape[1];
      weight[i] = 0;
      origin_x[i] = origin_y[i] = T(-0.5);
      step_x[i] = width[i];
      step_y[i] = height[i];
    }
  }
};

}  // namespace
}  // namespace survfuse
