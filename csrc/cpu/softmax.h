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
