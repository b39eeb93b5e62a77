#define SURVFUSE_VECTOR_BYTES 64
#include "cpu/cross_attention_engine.h"

namespace survfuse {

CrossAttentionEngine cross_attention_engine_avx512(bool is_double) {
  return is_double ? make_engine<VectorProducts<double>, double>()
                   : make_engine<VectorProducts<float>, float>();
}

}  // namespace survfuse
