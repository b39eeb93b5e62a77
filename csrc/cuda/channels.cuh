// Runs of channels: how a thread reads, adds and writes V neighbouring numbers of a type at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../pool_bag.h"

namespace survfuse {

template <int BYTES>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<2> {
  using type = uint16_t;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// V channels as one word of memory; a pointer to them is aligned to the word.
template <class T, int V>
struct Channels {
  using Word = typename WordOf<V * sizeof(T)>::type;
  Word word;

  __device__ static Channels zero() { return Channels{Word{}}; }
  __device__ static Channels load(const T* p) {
    return Channels{__ldg(reinterpret_cast<const Word*>(p))};
  }
  __device__ void unpack(float (&x)[V]) const {
    const T* element = reinterpret_cast<const T*>(&word);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = to_float(element[i]);
  }
  __device__ static void store(T* p, const float (&x)[V]) {
    Word packed;
    T* element = reinterpret_cast<T*>(&packed);
#pragma unroll
    for (int i = 0; i < V; ++i) element[i] = from_float<T>(x[i]);
    *reinterpret_cast<Word*>(p) = packed;
  }
};

// target[i] += x[i], atomically: up to four numbers a request where the processor has such (sm_90).
template <int V>
__device__ inline void add_atomically(float* target, const float (&x)[V]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int kStep = V % 4 == 0 ? 4 : V % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int i = 0; i < V; i += kStep) {
    if constexpr (kStep == 4) {
      asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target + i),
                   "f"(x[i]), "f"(x[i + 1]), "f"(x[i + 2]), "f"(x[i + 3])
                   : "memory");
    } else if constexpr (kStep == 2) {
      asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(target + i), "f"(x[i]),
                   "f"(x[i + 1])
                   : "memory");
    } else {
      atomicAdd(target + i, x[i]);
    }
  }
#else
#pragma unroll
  for (int i = 0; i < V; ++i) atomicAdd(target + i, x[i]);
#endif
}

// The same in fixed point. Two factors make the scale, which need not be a number of fp32.
template <int V>
__device__ inline void add_fixed(int64_t* target, const float (&x)[V], float2 scale) {
#pragma unroll
  for (int i = 0; i < V; ++i)
    atomicAdd(reinterpret_cast<unsigned long long*>(target + i),
              static_cast<unsigned long long>(__float2ll_rn(x[i] * scale.x * scale.y)));
}

// One number of a tensor whose type is known at run time: fp32, bf16 or fp16.
__device__ inline float load_number(const void* p, ElementType type, int64_t index) {
  if (type == ElementType::kFloat32) return __ldg(static_cast<const float*>(p) + index);
  const uint16_t bits = __ldg(static_cast<const uint16_t*>(p) + index);
  if (type == ElementType::kBFloat16) return to_float(__ushort_as_bfloat16(bits));
  return to_float(__ushort_as_half(bits));
}

}  // namespace survfuse
