// gated_attention_pool: pooling of ragged bags by gated attention.
// Contract: survfuse/ops/gated_attention_pool.py.  Oracle: the same name under survfuse/reference.
// Math: docs/math.md, "Gated attention pooling".  "acc" is double for a double bag, else float.
#pragma once

#include "pool_bag.h"

namespace survfuse {

struct GatedParams {
  const void* bag;  // [T, D] in  rows bag_stride elements apart
  ElementType bag_type;
  int64_t bag_stride;
  const void *w_tanh, *w_gate;  // [L, D] in  acc
  const void *b_tanh, *b_gate;  // [L]    in  acc; null for none
  const void* w_score;          // [K, L] in  acc
  const void* b_score;          // [K]    in  acc; null for none
  const void* bias;             // [T]    in  acc; null for none; -inf excludes a row
  const int64_t* starts;        // [B]    in
  const int64_t* lengths;       // [B]    in
  int64_t n_bags, dim, n_hidden, n_pools;
  double dropout_p;  // 0: no mask is drawn
  uint64_t seed;
  void* workspace;  // gated_attention_pool_workspace() bytes
  int n_threads;
  CpuIsa isa;  // kAuto but in tests
};

struct GatedForward {
  GatedParams in;
  void* pooled;  // [B, K, D] out  acc, zeroed by the caller
  void* lse;     // [B, K]    out  acc, -inf from the caller
};

struct GatedBackward {
  GatedParams in;
  const void* lse;            // [B, K]    in   acc, from the forward
  const void* delta;          // [B, K]    in   acc, d_pooled . pooled - d_lse
  const void* d_pooled;       // [B, K, D] in   acc
  void *d_w_tanh, *d_w_gate;  // [L, D]    out  acc; null: not wanted
  void *d_b_tanh, *d_b_gate;  // [L]       out  acc; null: not wanted
  void* d_w_score;            // [K, L]    out  acc; null: not wanted
  void* d_bag;                // [T, D]    out  contiguous; null: not wanted
  void* d_bias;               // [T]       out  acc; null: not wanted
  ElementType d_bag_type;     // that of the bag, or acc
  int overlapping;  // bags share rows: d_bag and d_bias are zeroed by the caller and added to, bag
                    // by bag in ascending order; else each row is written once
};

// Bytes of workspace of one direction; the address of the workspace is not read.
int64_t gated_attention_pool_workspace(const GatedParams& in, bool backward);
void gated_attention_pool_forward_cpu(const GatedForward& p);
void gated_attention_pool_backward_cpu(const GatedBackward& p);

}  // namespace survfuse
