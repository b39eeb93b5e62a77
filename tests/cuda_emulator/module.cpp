// The CUDA launchers as survfuse._native binds them, over kernels that run in the emulator.
#include <stdexcept>

#include "bindings.h"
#include "emulator.h"
#include "multi_scale_deformable_attention.h"

namespace survfuse {

void deformable_forward_cpu(const DeformableForward&) { throw std::logic_error("emulates CUDA"); }
void deformable_backward_cpu(const DeformableBackward&) { throw std::logic_error("emulates CUDA"); }

}  // namespace survfuse

PYBIND11_MODULE(survfuse_emulated, m) {
  survfuse::bind_multi_scale_deformable_attention(m);
  m.def("set_order", &emulator::set_order);
  m.def("limit_grid", &emulator::limit_grid);
}
