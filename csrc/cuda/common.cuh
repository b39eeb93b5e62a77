// What every CUDA launcher shares. Tests compile these files by the host's compiler as well,
// against the headers of tests/cuda_emulator: hence `launch` and `dynamic_shared` instead of CUDA's
// syntax.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace survfuse {

// Every error becomes an exception, that of a launch included.
inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Starts a kernel on a stream; a launch that the device refuses becomes an exception naming `what`.
template <class... Parameters, class... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), unsigned grid, unsigned block,
            size_t shared_bytes, void* stream, const Arguments&... arguments) {
#ifdef __CUDACC__
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
#else
  emulator::launch(grid, block, shared_bytes, stream, [&] { kernel(arguments...); });
#endif
  check(cudaGetLastError(), what);
}

// The block's dynamic shared memory, 16-byte aligned.
__device__ inline void* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char survfuse_dynamic_shared[];
  return survfuse_dynamic_shared;
#else
  return emulator::dynamic_shared();
#endif
}

constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

// The sum over groups of G neighbouring lanes, the same bits in each of them.
template <int G>
__device__ inline float group_sum(float x) {
#pragma unroll
  for (int offset = G / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kWholeWarp, x, offset);
  return x;
}

template <int G>
__device__ inline float group_max(float x) {
#pragma unroll
  for (int offset = G / 2; offset > 0; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, offset));
  return x;
}

// 64-bit division takes a hundred instructions; most operands need 32 bits.
__device__ inline int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

}  // namespace survfuse
