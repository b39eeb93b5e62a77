#define SURVFUSE_VECTOR_BYTES 64
#include "cpu/gated_attention_pool_engine.h"
#include "cpu/panels.h"

namespace survfuse {

GatedEngine gated_engine_avx512(bool is_double) {
  return is_double ? make_gated_engine<VectorPanels<double>, double>()
                   : make_gated_engine<VectorPanels<float>, float>();
}

}  // namespace survfuse
