// position_biased_attention: attention whose logits carry a small MLP of each pair's offset.
// Contract: survfuse/ops/position_biased_attention.py.  Oracle: the same name under
// survfuse/reference.  Math: docs/math.md, "Attention biased by position".
// "acc" is double for double features, else float.
#pragma once

#include "pool_bag.h"

namespace survfuse {

// Rows of every head, any strides but a unit last one, in elements.
struct BiasedRows {
  const void* data;
  ElementType type;
  int64_t bag_stride, row_stride, head_stride;
};

// Everything contiguous where no stride is given. G groups of H / G = O heads.
struct BiasedParams {
  BiasedRows query;        // [T, H, d]     in
  BiasedRows key;          // [B, M, H, d]  in
  BiasedRows value;        // [B, M, H, dv] in
  const void* query_pos;   // [T, 2]        in  acc
  const void* key_pos;     // [B, G, M, 2]  in  acc
  const void* parameters;  // in  acc; of each layer weight [out, in], bias [out]; or [O, n, n]
  const void* reach;       // [2] in  acc; null: no table but the MLP
  int64_t depth, width;    // hidden layers of the MLP and their units
  int64_t table_size;      // n of the table; 0 without
  const int64_t* starts;   // [B]           in  rows of the queries
  const int64_t* lengths;  // [B]           in
  int64_t n_bags, n_heads, n_groups, n_keys, dim, value_dim;
  double scale;
  double dropout_p;  // 0: no mask is drawn
  uint64_t seed;
  void* workspace;  // position_biased_attention_workspace() bytes
  int n_threads;
  CpuIsa isa;  // kAuto but in tests
};

// "total": query rows of all bags, packed one bag behind the other.
struct BiasedForward {
  BiasedParams in;
  void* out;  // [total, H, dv] out  acc
  void* lse;  // [total, H]     out  acc
};

struct BiasedBackward {
  BiasedParams in;
  BiasedRows out;      // [total, H, dv] in   from the forward
  BiasedRows d_out;    // [total, H, dv] in
  const void* lse;     // [total, H]     in   acc
  const void* d_lse;   // [total, H]     in   acc
  void* d_query;       // [total, H, d]  out  acc; null: not wanted
  void* d_query_pos;   // [total, G, 2]  out  acc; null: not wanted
  void* d_key;         // [B, M, H, d]   out  acc; null: not wanted
  void* d_value;       // [B, M, H, dv]  out  acc; null: not wanted
  void* d_key_pos;     // [B, G, M, 2]   out  acc; null: not wanted
  void* d_parameters;  // as parameters  out  acc; null: not wanted
};

// Bytes of workspace of one direction; the address of the workspace is not read.
int64_t position_biased_attention_workspace(const BiasedParams& in, bool backward);
void position_biased_attention_forward_cpu(const BiasedForward& p);
void position_biased_attention_backward_cpu(const BiasedBackward& p);

}  // namespace survfuse
