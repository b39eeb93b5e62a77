// What the CUDA part of this build can see.
#pragma once

#include <string>

namespace survfuse {

struct CudaStatus {
  int runtime_version = 0, driver_version = 0, n_devices = 0;
  std::string error;  // why no device can be used; empty if one can
};

CudaStatus cuda_status();

}  // namespace survfuse
