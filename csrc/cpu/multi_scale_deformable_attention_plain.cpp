#define SURVFUSE_VECTOR_BYTES 16
#include "cpu/multi_scale_deformable_attention_kernel.h"

namespace survfuse {

DeformableEngine deformable_engine_plain(bool is_double) {
  return is_double ? make_deformable_engine<double>() : make_deformable_engine<float>();
}

}  // namespace survfuse
