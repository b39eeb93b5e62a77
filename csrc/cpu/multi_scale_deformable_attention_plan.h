// What the instruction-set files offer the launcher.
#pragma once

#include <cstdint>

#include "multi_scale_deformable_attention.h"

namespace survfuse {

// Levels [first_level, last_level) of one head of one batch, over all queries: no other piece
// touches their pixels' gradients, so these are summed in the order of the queries.
struct DeformablePiece {
  int64_t batch, head, first_level, last_level;
};

// One per instruction set and accumulation type.
struct DeformableEngine {
  int64_t (*scratch_bytes)(const DeformableParams&);
  // queries [begin, end) of all batches' B * Q
  void (*forward)(const DeformableForward&, int64_t begin, int64_t end, char* scratch);
  // with a reference, d_weights is left as the gradient of the softmax's result
  void (*backward)(const DeformableBackward&, const DeformablePiece&, char* scratch);
  // d_weights of queries [begin, end), from that of the softmax's result
  void (*softmax_backward)(const DeformableBackward&, int64_t begin, int64_t end);
};

DeformableEngine deformable_engine_plain(bool is_double);
DeformableEngine deformable_engine_avx2(bool is_double);
DeformableEngine deformable_engine_avx512(bool is_double);

}  // namespace survfuse
