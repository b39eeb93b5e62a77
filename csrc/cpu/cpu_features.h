// Which instruction set the kernels use: asked of the processor at run time, never of the compiler.
#pragma once

namespace survfuse {

enum class CpuIsa : int { kAuto = 0, kPlain = 1, kAvx2 = 2, kAvx512 = 3, kAvx512Bf16 = 4 };

bool isa_available(CpuIsa isa);
CpuIsa best_isa();
const char* isa_name(CpuIsa isa);
bool has_amx_bf16();

}  // namespace survfuse
