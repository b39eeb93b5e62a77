#define SURVFUSE_VECTOR_BYTES 32
#include "cpu/multi_scale_deformable_attention_kernel.h"

namespace survfuse {

DeformableEngine deformable_engine_avx2(bool is_double) {
  return is_double ? make_deformable_engine<double>() : make_deformable_engine<float>();
}

}  // namespace survfuse
