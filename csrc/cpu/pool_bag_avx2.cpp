#define SURVFUSE_VECTOR_BYTES 32
#include "cpu/pool_bag_engine.h"

namespace survfuse {

PoolBagEngine pool_bag_engine_avx2(bool is_double) {
  return is_double ? make_engine<VectorProducts<double>, double>()
                   : make_engine<VectorProducts<float>, float>();
}

}  // namespace survfuse
