#include "cuda/common.cuh"
#include "device.h"

namespace survfuse {
namespace {

// Loading it proves that this build holds code the device can run.
__global__ void probe_kernel(int* out) { *out = 1; }

}  // namespace

CudaStatus cuda_status() {
  CudaStatus status;
  cudaRuntimeGetVersion(&status.runtime_version);
  cudaDriverGetVersion(&status.driver_version);
  if (status.driver_version == 0) {
    status.error = "no CUDA driver";
    return status;
  }
  try {
    check(cudaGetDeviceCount(&status.n_devices), "cudaGetDeviceCount");
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, probe_kernel), "loading a kernel of this build");
  } catch (const std::runtime_error& error) {
    status.error = error.what();
    cudaGetLastError();
  }
  return status;
}

}  // namespace survfuse
