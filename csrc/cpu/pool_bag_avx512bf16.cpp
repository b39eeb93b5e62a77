#define SURVFUSE_VECTOR_BYTES 64
#include "cpu/pool_bag_engine.h"
#include "cpu/products_bf16.h"

namespace survfuse {

PoolBagEngine pool_bag_engine_avx512bf16() { return make_engine<PairProducts, float>(); }

}  // namespace survfuse
