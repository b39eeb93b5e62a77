// CUDA's runtime as far as the kernels of csrc/cuda use it, for a host compiler. Stands in for the
// toolkit's header where tests compile those kernels to run on a CPU; see emulator.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// one copy for all blocks, which run one after another; poisoned before each
#define __shared__ static __attribute__((section("emulated_shared")))

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define threadIdx (emulator::current_thread())
#define blockIdx (emulator::current_block())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())

using std::max;
using std::min;

inline void __syncthreads() { emulator::wait_for_block(); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  emulator::exchange(emulator::Kind::kSync, mask, 0, 0);
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  static_assert(sizeof(T) == 4, "32-bit values");
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const int lane = threadIdx.x % 32, source = lane ^ lane_mask;
  // a source in another segment of the warp: the own value
  const bool outside = source / width > lane / width;
  bits = emulator::exchange(emulator::Kind::kShuffle, mask, bits, outside ? lane : source);
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  static_assert(sizeof(T) == 4, "32-bit values");
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const int lane = threadIdx.x % 32;
  source = lane / width * width + source % width;
  bits = emulator::exchange(emulator::Kind::kShuffle, mask, bits, source);
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

// fibers change places only where they wait: a plain addition is atomic
template <class T>
inline T atomicAdd(T* target, T value) {
  const T before = *target;
  *target = before + value;
  return before;
}

template <class T>
inline T __ldg(const T* p) {
  return *p;
}
// kernels are compiled with -ffp-contract=off, which is what these promise
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline long long __float2ll_rn(float x) {
  return std::fabs(x) < 9.2e18f ? std::llrint(x) : INT64_MIN;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return emulator::take_error(); }
inline const char* cudaGetErrorString(cudaError_t) { return emulator::error_text(); }
