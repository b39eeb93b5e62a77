// Kernels with the faults that the emulator exists to find, and their sound twins.
#include "../../csrc/cuda/common.cuh"

namespace {

using namespace survfuse;

// Each thread passes its number to the next through dynamic shared memory.
__global__ void rotate_kernel(float* out, int n_barriers) {
  float* shared = static_cast<float*>(dynamic_shared());
  shared[threadIdx.x] = threadIdx.x;
  if (n_barriers == 1) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

// The same in static shared memory, which a warp at a time fills.
__global__ void static_kernel(float* out, int n_barriers) {
  __shared__ float shared[64];
  shared[threadIdx.x] = threadIdx.x;
  if (n_barriers == 1) __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

__global__ void divergent_kernel(float* out, int n_lanes) {
  if (static_cast<int>(threadIdx.x) < n_lanes)
    out[threadIdx.x] = group_sum<32>(static_cast<float>(threadIdx.x));
}

// Writes one number behind its shared memory if asked to.
__global__ void overflow_kernel(float* out, int excess) {
  float* shared = static_cast<float*>(dynamic_shared());
  shared[threadIdx.x + excess] = 1;
  out[threadIdx.x] = shared[threadIdx.x];
}

// Writes two numbers at once, `offset` numbers from where that is allowed.
__global__ void misaligned_kernel(float* out, int offset) {
  *reinterpret_cast<float2*>(out + offset) = make_float2(1, 2);
}

// The sum over all blocks, in the order they come.
__global__ void sum_kernel(float* out, int) {
  atomicAdd(out, 1.0f / static_cast<float>(1 + threadIdx.x + blockIdx.x * blockDim.x));
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* run_fault(const char* name,
                                                                        float* out, int argument,
                                                                        int n_blocks, int n_threads,
                                                                        uint64_t seed) {
  emulator::set_order(seed);
  const std::string kernel = name;
  const auto chosen = kernel == "rotate"       ? rotate_kernel
                      : kernel == "static"     ? static_kernel
                      : kernel == "divergent"  ? divergent_kernel
                      : kernel == "overflow"   ? overflow_kernel
                      : kernel == "misaligned" ? misaligned_kernel
                                               : sum_kernel;
  static std::string message;
  try {
    launch("a faulty kernel", chosen, n_blocks, n_threads, n_threads * sizeof(float), nullptr, out,
           argument);
    return "";
  } catch (const std::runtime_error& error) {
    message = error.what();
    return message.c_str();
  }
}
