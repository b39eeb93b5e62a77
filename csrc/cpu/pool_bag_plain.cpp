#define SURVFUSE_VECTOR_BYTES 16
#include "cpu/pool_bag_engine.h"

namespace survfuse {

PoolBagEngine pool_bag_engine_plain(bool is_double) {
  return is_double ? make_engine<VectorProducts<double>, double>()
                   : make_engine<VectorProducts<float>, float>();
}

}  // namespace survfuse
