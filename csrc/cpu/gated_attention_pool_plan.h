// What the instruction-set files offer the launcher of gated_attention_pool, and how it cuts work.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "gated_attention_pool.h"

namespace survfuse {

// The rows of all bags one behind the other: row i of them is of the bag b with
// first[b] <= i < first[b + 1].
struct PackedRows {
  std::vector<int64_t> first;  // [B + 1]
};

// A range of packed rows, done by one thread. The cut depends on sizes alone, never on the threads,
// so the sums have one order.
struct GatedChunk {
  int64_t begin, end;
  int64_t slot;  // partial results in the workspace
  bool fresh;    // the first chunk of its slot
};

// One part of a bag: of the softmax of each pool the maximum, the sum, and the rows it weights.
template <class Acc>
struct GatedPart {
  Acc *top, *sum, *z;  // [K], [K], [K, D]

  GatedPart(void* memory, const GatedParams& in)
      : top(static_cast<Acc*>(memory)), sum(top + in.n_pools), z(sum + in.n_pools) {}

  static int64_t size(const GatedParams& in) { return in.n_pools * (2 + in.dim); }
};

// The results of one bag, from all of it.
template <class Acc>
void write_gated_result(const GatedForward& p, int64_t bag, const GatedPart<Acc>& sums) {
  const GatedParams& in = p.in;
  const Acc infinity = static_cast<Acc>(INFINITY);
  for (int64_t k = 0; k < in.n_pools; ++k) {
    const Acc top = sums.top[k], sum = sums.sum[k];
    if (sum == 0) continue;  // nothing included: the caller has written that
    const int64_t at = bag * in.n_pools + k;
    static_cast<Acc*>(p.lse)[at] = top == infinity ? top : top + std::log(sum);
    Acc* pooled = static_cast<Acc*>(p.pooled) + at * in.dim;
    for (int64_t d = 0; d < in.dim; ++d) pooled[d] = sums.z[k * in.dim + d] / sum;
  }
}

// Forward slots hold two parts: of the bag that began before the chunk, and of the one that ends
// behind it.
template <class Acc>
int64_t forward_slot_bytes(const GatedParams& in) {
  return 2 * GatedPart<Acc>::size(in) * static_cast<int64_t>(sizeof(Acc));
}

// Backward slots: the parameters' gradients, hidden units padded, both branches side by side.
template <class Acc>
struct GatedSlot {
  Acc *d_weights, *d_biases, *d_score;  // [2 Lp, Dp], [2 Lp], [K, Lp]

  GatedSlot(void* memory, int64_t columns, int64_t padded_dim)
      : d_weights(static_cast<Acc*>(memory)),
        d_biases(d_weights + columns * padded_dim),
        d_score(d_biases + columns) {}

  // All but d_weights, which the first tile writes.
  void clear_sums(int64_t columns, int64_t n_pools) const {
    std::fill(d_biases, d_score + n_pools * columns / 2, Acc(0));
  }

  static int64_t bytes(int64_t columns, int64_t padded_dim, int64_t n_pools) {
    const int64_t size = columns * padded_dim + columns + n_pools * columns / 2;
    return (size * static_cast<int64_t>(sizeof(Acc)) + 63) / 64 * 64;
  }
};

// One per instruction set and accumulation type.
struct GatedEngine {
  // the parameters as they are multiplied, shared by all threads
  int64_t (*packed_bytes)(const GatedParams&);
  void (*pack)(const GatedParams&, bool d_bag, char* packed);
  int64_t (*scratch_bytes)(const GatedParams&);
  // 2 Lp and Dp of GatedSlot
  int64_t (*hidden_columns)(const GatedParams&);
  int64_t (*padded_dim)(const GatedParams&);
  void (*forward)(const GatedForward&, const PackedRows&, const GatedChunk&, char* packed,
                  char* scratch, char* slot);
  void (*backward)(const GatedBackward&, const PackedRows&, const GatedChunk&, char* packed,
                   char* scratch, char* slot);
};

GatedEngine gated_engine_plain(bool is_double);
GatedEngine gated_engine_avx2(bool is_double);
GatedEngine gated_engine_avx512(bool is_double);
GatedEngine gated_engine_avx512bf16();  // bf16 only

}  // namespace survfuse
