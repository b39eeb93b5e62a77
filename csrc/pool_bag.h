// pool_bag: softmax pooling of ragged bags that are both keys and values.
// Contract: survfuse/ops/pool_bag.py.  Oracle: survfuse/reference/pool_bag.py.  Math: docs/math.md.
// "acc" below is double for a double bag and float for every other.
#pragma once

#include <cstdint>

#include "cpu/cpu_features.h"

namespace survfuse {

enum class ElementType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

struct PoolBagParams {
  const void* rows;        // [B, R, D] in   acc
  const void* bag;         // [T, D]    in   rows bag_stride elements apart
  const void* bias;        // [T]       in   acc; null for none; -inf excludes a row
  const int64_t* starts;   // [B]       in
  const int64_t* lengths;  // [B]       in
  const void* mean;        // [T]       in   acc; null: computed from the row
  const void* rstd;        // [T]       in   acc; null with mean
  int64_t n_bags, n_rows, dim, bag_stride;
  ElementType bag_type;
  double scale;
  int normalize;  // rows of the bag are layer-normalised, without affine part
  double eps;
  double dropout_p;  // 0: no mask is drawn
  uint64_t seed;
  void* workspace;  // pool_bag_workspace() bytes
  int n_threads;
  CpuIsa isa;  // kAuto but in tests
};

struct PoolBagForward {
  PoolBagParams in;
  void* pooled;      // [B, R, D] out  acc
  void* lse;         // [B, R]    out  acc
  void* weight_sum;  // [B, R]    out  acc
};

struct PoolBagBackward {
  PoolBagParams in;
  const void* lse;           // [B, R]    in   acc, from the forward
  const void* delta;         // [B, R]    in   acc, d_pooled . pooled + d_ws * ws - d_lse
  const void* d_pooled;      // [B, R, D] in   acc
  const void* d_weight_sum;  // [B, R]    in   acc
  void* d_rows;              // [B, R, D] out  acc; null: not wanted
  void* d_logit_sum;         // [B, R]    out  acc; sum of the logits' gradients of each row
  void* d_bag;               // [T, D]    out  contiguous; null: not wanted
  void* d_bias;              // [T]       out  acc; null: not wanted
  ElementType d_bag_type;    // that of the bag, or acc
  int overlapping;  // bags share rows: d_bag and d_bias are zeroed by the caller and added to, bag
                    // by bag in ascending order; else each row is written once
};

// Bytes of workspace either direction needs, for a batch of `total` rows in all.
int64_t pool_bag_workspace(int64_t n_bags, int64_t n_rows, int64_t dim, int64_t total,
                           ElementType bag_type, int n_threads);

void pool_bag_forward_cpu(const PoolBagForward& p);
void pool_bag_backward_cpu(const PoolBagBackward& p);

}  // namespace survfuse
