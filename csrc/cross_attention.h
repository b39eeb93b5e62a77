// cross_attention: attention with keys and values given, one side few and the other long.
// Contract: survfuse/ops/cross_attention.py and spread_tokens.py.  Oracle: the same names under
// survfuse/reference.  Math: docs/math.md.  "acc" is double for double tensors, else float.
#pragma once

#include "pool_bag.h"

namespace survfuse {

// A packed [T, H, d] with any strides but a unit last one, in elements.
struct HeadRows {
  const void* data;
  ElementType type;
  int64_t row_stride, head_stride;
};

struct CrossAttentionParams {
  HeadRows query;    // [Tq, H, d]  in   head stride 0: all heads have the same rows
  HeadRows key;      // [Tk, H, d]  in
  HeadRows value;    // [Tk, H, dv] in   of the type of key
  const void* bias;  // [Tk] or [Tk, H] in  acc; null for none
  int64_t bias_row_stride, bias_head_stride;    // head stride 0: one number per key
  const int64_t *query_starts, *query_lengths;  // [B] in
  const int64_t *key_starts, *key_lengths;      // [B] in
  int64_t n_bags, n_heads, dim, value_dim;
  int few_queries;  // the keys are the long side, cut into chunks; else the queries are
  double scale;
  int normalize;  // long queries are layer-normalised first, without affine part
  double eps;
  const void *mean, *rstd;  // [Tq] in  acc; null: computed from the row
  double dropout_p;         // 0: no mask is drawn
  uint64_t seed;
  void* workspace;  // cross_attention_workspace() bytes
  int n_threads;
  CpuIsa isa;  // kAuto but in tests
};

struct CrossAttentionForward {
  CrossAttentionParams in;
  void* out;             // [total, H, dv] out  few queries: acc, zeroed by the caller
  ElementType out_type;  // of long queries
  void* lse;             // [total, H] out  acc; few queries: -inf from the caller
};

struct CrossAttentionBackward {
  CrossAttentionParams in;
  const void* lse;          // [total, H]     in  acc
  const void* mean;         // [total, H]     in  acc, d_out . out; few queries only
  HeadRows d_out;           // [total, H, dv] in  few queries: acc
  const void* d_lse;        // [total, H]     in  acc
  void* d_query;            // [Tq, H, d]     out contiguous (one head, if shared); null: not wanted
  void* d_key;              // [Tk, H, d]     out contiguous
  void* d_value;            // [Tk, H, dv]    out contiguous
  void* d_bias;             // as bias        out acc, contiguous
  ElementType d_long_type;  // of the long side's gradients; the others are acc, zeroed, added to
  int overlapping;          // bags share rows of the long side: it is zeroed and added to as well
};

int64_t cross_attention_workspace(const CrossAttentionParams& in);
void cross_attention_forward_cpu(const CrossAttentionForward& p);
void cross_attention_backward_cpu(const CrossAttentionBackward& p);

}  // namespace survfuse
