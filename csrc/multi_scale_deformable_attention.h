// multi_scale_deformable_attention: each query samples a few points of every level of a pyramid.
// Contract: survfuse/ops/multi_scale_deformable_attention.py.  Oracle: the same name under
// survfuse/reference.  Math: docs/math.md, "Multi-scale deformable attention".
// "acc" is double for a double value, else float.
#pragma once

#include "pool_bag.h"

namespace survfuse {

struct DeformableParams {
  const void* value;  // [B, S, H, d] in  the last stride is 1
  ElementType value_type;
  int64_t batch_stride, row_stride, head_stride;  // of value, in elements
  const int64_t* shapes;    // [L, 2]             in  (height, width); levels lie one behind another
  const void* points;       // [B, Q, H, L, P, 2] in  acc; (x, y), or offsets from the reference
  const void* weights;      // [B, Q, H, L, P]    in  or logits, where there is a reference
  ElementType weight_type;  // acc on the CPU
  const void* reference;    // [B, Q, L, 2 or 4]  in  acc; null: points are locations
  int64_t reference_dim;
  int64_t n_batches, n_queries, n_rows, n_heads, dim, n_levels, n_points;
  int n_threads;  // CPU
  CpuIsa isa;     // CPU; kAuto but in tests
  void* stream;   // CUDA
};

struct DeformableForward {
  DeformableParams in;
  void* out;  // [B, Q, H, d] out  the value's type
  void* lse;  // [B, Q, H]    out  acc; null without a reference
};

struct DeformableBackward {
  DeformableParams in;
  const void* d_out;  // [B, Q, H, d]       in   the value's type
  void* d_value;      // [B, S, H, d]       out  acc, zeroed by the caller; null: not wanted
  void* d_points;     // [B, Q, H, L, P, 2] out  acc
  void* d_weights;    // [B, Q, H, L, P]    out  acc
  void* d_reference;  // [B, Q, H, L, 2|4]  out  acc, one part per head; null: not wanted
  // CUDA, all null but in deterministic mode; there d_value is overwritten
  int64_t* fixed_d_value;    // [B, S, H, d] scratch  zeroed by the caller
  const float* fixed_scale;  // [2]          in       their product makes numbers fixed; NaN: NaN
};

void deformable_forward_cpu(const DeformableForward& p);
void deformable_backward_cpu(const DeformableBackward& p);
// value, out, d_out: fp32, bf16 or fp16; the rest as said, acc being fp32. Any of the backward's
// results may be null: not wanted.
void deformable_forward_cuda(const DeformableForward& p);
void deformable_backward_cuda(const DeformableBackward& p);

}  // namespace survfuse
