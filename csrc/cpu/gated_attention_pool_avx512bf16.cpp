#define SURVFUSE_VECTOR_BYTES 64
#include "cpu/gated_attention_pool_engine.h"
#include "cpu/panels_bf16.h"

namespace survfuse {

GatedEngine gated_engine_avx512bf16() { return make_gated_engine<PairPanels, float>(); }

}  // namespace survfuse
