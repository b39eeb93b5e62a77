// The CUDA launchers as survfuse._native binds them, over kernels that run in the emulator.
#include "bindings.h"
#include "emulator.h"

PYBIND11_MODULE(survfuse_emulated, m) {
  survfuse::bind_multi_scale_deformable_attention_cuda(m);
  m.def("set_order", &emulator::set_order);
}
