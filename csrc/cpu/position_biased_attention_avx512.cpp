#define SURVFUSE_VECTOR_BYTES 64
#include "cpu/position_biased_attention_engine.h"

namespace survfuse {

BiasedEngine biased_engine_avx512(bool is_double) {
  return is_double ? make_biased_engine<double>() : make_biased_engine<float>();
}

}  // namespace survfuse
