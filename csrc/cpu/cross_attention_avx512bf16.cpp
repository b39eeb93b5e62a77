#define SURVFUSE_VECTOR_BYTES 64
#include "cpu/cross_attention_engine.h"
#include "cpu/panels_bf16.h"

namespace survfuse {

CrossAttentionEngine cross_attention_engine_avx512bf16() {
  return make_engine<PairProducts, float>();
}

}  // namespace survfuse
