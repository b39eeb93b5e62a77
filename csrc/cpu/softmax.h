// Pieces of a softmax over a tile of logits: exponentials and dropout.
#pragma once

#include "cpu/philox.h"
#include "cpu/vector.h"

namespace survfuse {
namespace {

// out = exp(scores - shift), with excluded entries (-inf) exactly 0.
template <class Acc>
void exp_row(const Acc* scores, Acc shift, int64_t n, Acc* out) {
  const Vec<Acc> shifts = splat(shift);
  int64_t i = 0;
  for (; i + kLanes<Acc> <= n; i += kLanes<Acc>)
    store(out + i, vector_exp(load(scores + i) - shifts));
  if (i < n) {
    Acc tail[kLanes<Acc>] = {};
    std::memcpy(tail, scores + i, (n - i) * sizeof(Acc));
    store(tail, vector_exp(load(tail) - shifts));
    std::memcpy(out + i, tail, (n - i) * sizeof(Acc));
  }
}

// The larger of `top` and the largest of n numbers; a NaN is not seen.
template <class Acc>
Acc row_max(const Acc* values, int64_t n, Acc top) {
  constexpr int kChains = 4;  // comparisons wait for one another
  Vec<Acc> most[kChains];
  for (int c = 0; c < kChains; ++c) most[c] = splat(top);
  int64_t i = 0;
  for (; i + kChains * kLanes<Acc> <= n; i += kChains * kLanes<Acc>)
    for (int c = 0; c < kChains; ++c) {
      const Vec<Acc> x = load(values + i + c * kLanes<Acc>);
      most[c] = x > most[c] ? x : most[c];
    }
  for (; i + kLanes<Acc> <= n; i += kLanes<Acc>) {
    const Vec<Acc> x = load(values + i);
    most[0] = x > most[0] ? x : most[0];
  }
  for (int c = 1; c < kChains; ++c) most[0] = most[c] > most[0] ? most[c] : most[0];
  for (int lane = 0; lane < kLanes<Acc>; ++lane) top = most[0][lane] > top ? most[0][lane] : top;
  for (; i < n; ++i) top = values[i] > top ? values[i] : top;
  return top;
}

// The sum of value(i) over n numbers; value takes a place and gives a register or, with `one`, a
// number.
template <class Acc, class Value, class One>
Acc row_sum_of(int64_t n, const Value& value, const One& one) {
  constexpr int kChains = 4;
  Vec<Acc> sum[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes<Acc> <= n; i += kChains * kLanes<Acc>)
    for (int c = 0; c < kChains; ++c) sum[c] += value(i + c * kLanes<Acc>);
  for (; i + kLanes<Acc> <= n; i += kLanes<Acc>) sum[0] += value(i);
  Acc total = horizontal_sum<Acc>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < n; ++i) total += one(i);
  return total;
}

// The sum of n numbers.
template <class Acc>
Acc row_sum(const Acc* values, int64_t n) {
  return row_sum_of<Acc>(
      n, [&](int64_t i) { return load(values + i); }, [&](int64_t i) { return values[i]; });
}

// The sum of weights times numbers; a weight of 0 counts for nothing, whatever it stands at.
template <class Acc>
Acc weighted_sum(const Acc* weights, const Acc* values, int64_t n) {
  return row_sum_of<Acc>(
      n,
      [&](int64_t i) {
        const Vec<Acc> w = load(weights + i);
        return w == 0 ? Vec<Acc>{} : w * load(values + i);
      },
      [&](int64_t i) { return weights[i] == 0 ? Acc(0) : weights[i] * values[i]; });
}

// The mask of one call; a weight's place is (position of its key, its row, its bag).
template <class Acc>
struct Dropout {
  uint64_t seed;
  uint32_t threshold;
  Acc factor;

  Dropout(uint64_t seed, double p)
      : seed(seed), threshold(keep_threshold(p)), factor(static_cast<Acc>(1.0 / (1.0 - p))) {}

  // n weights, positions (rows) ahead of the first by multiples of the steps.
  void apply(int64_t bag, int64_t row, int64_t row_step, int64_t position, int64_t position_step,
             int64_t n, Acc* values) const {
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t word =
          philox_word(seed, static_cast<uint32_t>(position + i * position_step),
                      static_cast<uint32_t>(row + i * row_step), static_cast<uint32_t>(bag));
      values[i] = word >= threshold ? values[i] * factor : 0;
    }
  }
};

}  // namespace
}  // namespace survfuse
