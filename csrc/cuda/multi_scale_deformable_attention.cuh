// What both directions share: levels, places and weights of samples, and their corners.
// G neighbouring lanes form a group, which serves one head of one query; each lane has V channels.
// A warp computes the places of its groups' samples once, a lane a sample, into shared memory.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "../multi_scale_deformable_attention.h"
#include "channels.cuh"
#include "common.cuh"

namespace survfuse {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kSlots = 128;       // samples of a warp that are staged at once
constexpr int kBatch = 2;         // samples of a group whose corners are in flight together
constexpr int kMaxLevels = 1024;  // what is left of 48 KB of shared memory

struct Level {
  int height, width, start, padding;
};

__device__ inline int64_t clamped_side(int64_t side) {
  return side < 0 ? 0 : side > INT32_MAX ? INT32_MAX : side;
}

// Of shapes that do not fit the value nothing is believed: a level starts within it or at its end.
__device__ inline void read_levels(const DeformableParams& p, Level* levels) {
  for (int64_t l = threadIdx.x; l < p.n_levels; l += blockDim.x) {
    int64_t start = 0;
    for (int64_t k = 0; k < l; ++k) {
      start += clamped_side(p.shapes[2 * k]) * clamped_side(p.shapes[2 * k + 1]);
      start = start < p.n_rows ? start : p.n_rows;
    }
    levels[l] = {static_cast<int>(clamped_side(p.shapes[2 * l])),
                 static_cast<int>(clamped_side(p.shapes[2 * l + 1])), static_cast<int>(start), 0};
  }
  __syncthreads();
}

// The samples of one warp's groups in shared memory. Rows are padded: what the groups read at once
// then lies in different banks.
template <int G>
struct Staged {
  static constexpr int kGroups = 32 / G;
  static constexpr int kPerGroup = kSlots / kGroups;
  static constexpr int kRow = kPerGroup + 1;
  static constexpr int kBytes = (kGroups * (kRow * 24 + 8) + 15) / 16 * 16;

  float4* place;  // [kGroups, kRow] fractions x and y, weight, row of the upper left corner's bits
  int2* corners;  // [kGroups, kRow] width of the level, one bit per corner inside
  float2* softmax;  // [kGroups] largest logit and 1 / sum of exponentials

  __device__ explicit Staged(void* memory)
      : place(static_cast<float4*>(memory)),
        corners(reinterpret_cast<int2*>(place + kGroups * kRow)),
        softmax(reinterpret_cast<float2*>(corners + kGroups * kRow)) {}
};

template <int G>
constexpr size_t shared_bytes(int64_t n_levels) {
  return n_levels * sizeof(Level) + kWarps * static_cast<size_t>(Staged<G>::kBytes);
}

template <int G>
__device__ inline Staged<G> staged_of_warp(const DeformableParams& p) {
  char* memory = static_cast<char*>(dynamic_shared()) + p.n_levels * sizeof(Level);
  return Staged<G>(memory + threadIdx.x / 32 * Staged<G>::kBytes);
}

// Largest logit and 1 / sum of exponentials, the same in all lanes of the group. The backward
// computes it again: exp(logit - lse) would lose as many digits as lse has before its point.
template <int G>
__device__ inline float2 softmax_of(const DeformableParams& p, int64_t group) {
  const int n_samples = static_cast<int>(p.n_levels * p.n_points);
  const int64_t base = group * n_samples;
  float largest = -INFINITY;
  for (int s = threadIdx.x % G; s < n_samples; s += G)
    largest = fmaxf(largest, load_number(p.weights, p.weight_type, base + s));
  largest = group_max<G>(largest);
  float sum = 0;
  for (int s = threadIdx.x % G; s < n_samples; s += G)
    sum += expf(load_number(p.weights, p.weight_type, base + s) - largest);
  return make_float2(largest, 1 / group_sum<G>(sum));
}

// From what was read of the weights, which may be logits.
__device__ inline float weight_of(const DeformableParams& p, float2 softmax, float read) {
  return p.reference ? expf(read - softmax.x) * softmax.y : read;
}

// From a point to pixels of its level, whose centres lie at whole numbers: origin + point * step.
struct ToPixels {
  float2 origin, step;
};

__device__ inline ToPixels to_pixels(const DeformableParams& p, Level level, int64_t group,
                                     int level_index) {
  const float width = level.width, height = level.height;
  if (!p.reference) return {make_float2(-0.5f, -0.5f), make_float2(width, height)};
  const int64_t row = quotient(group, p.n_heads) * p.n_levels + level_index;
  const float* at = static_cast<const float*>(p.reference) + row * p.reference_dim;
  ToPixels map{make_float2(__fsub_rn(__fmul_rn(__ldg(at), width), 0.5f),
                           __fsub_rn(__fmul_rn(__ldg(at + 1), height), 0.5f)),
               make_float2(1, 1)};
  if (p.reference_dim == 4) {
    const float half = 0.5f / static_cast<float>(p.n_points);
    map.step = make_float2(__ldg(at + 2) * width * half, __ldg(at + 3) * height * half);
  }
  return map;
}

// No contraction: at a border the last bit decides whether a point is inside, and there the
// implementations must agree.
__device__ inline float2 pixel_of(const ToPixels& map, float2 at) {
  return make_float2(__fadd_rn(map.origin.x, __fmul_rn(at.x, map.step.x)),
                     __fadd_rn(map.origin.y, __fmul_rn(at.y, map.step.y)));
}

// Puts one sample into its slot; a point outside (false for NaN) gets no corner and no weight.
__device__ inline void place_sample(const DeformableParams& p, Level level, float2 pixel,
                                    float weight, float4* place, int2* corners) {
  *place = make_float4(0, 0, 0, 0);
  *corners = make_int2(0, 0);
  if (!(pixel.x > -1 && pixel.x < level.width && pixel.y > -1 && pixel.y < level.height)) return;
  const float left = floorf(pixel.x), top = floorf(pixel.y);
  const int x = static_cast<int>(left), y = static_cast<int>(top);
  const int64_t row = level.start + static_cast<int64_t>(y) * level.width + x;
  int held = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int cx = x + k % 2, cy = y + k / 2;
    const int64_t corner = row + k % 2 + (k / 2 ? level.width : 0);
    if (cx >= 0 && cx < level.width && cy >= 0 && cy < level.height && corner < p.n_rows)
      held |= 1 << k;
  }
  *place = make_float4(pixel.x - left, pixel.y - top, held ? weight : 0.0f,
                       __uint_as_float(static_cast<uint32_t>(row)));
  *corners = make_int2(level.width, held);
}

// Samples [begin, begin + kPerGroup) of the warp's groups, the first of which is `first`. What
// comes from far away is asked for kAhead samples at a time; more would not fit the registers.
template <int G>
__device__ inline void stage(const DeformableParams& p, const Level* levels,
                             const Staged<G>& staged, int64_t first, int64_t n_groups, int begin) {
  using S = Staged<G>;
  constexpr int kAhead = 2;
  const int n_points = static_cast<int>(p.n_points);
  const int n_samples = static_cast<int>(p.n_levels) * n_points;
  __syncwarp();
#pragma unroll 1
  for (int slot = threadIdx.x % 32; slot < kSlots; slot += 32 * kAhead) {
    float2 point[kAhead];
    float weight[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int sample = begin + (slot + 32 * i) % S::kPerGroup;
      const int64_t group = first + (slot + 32 * i) / S::kPerGroup;
      // a NaN lies outside
      point[i] = make_float2(NAN, NAN);
      weight[i] = 0;
      if (sample >= n_samples || group >= n_groups) continue;
      const int64_t index = group * n_samples + sample;
      point[i] = __ldg(static_cast<const float2*>(p.points) + index);
      weight[i] = load_number(p.weights, p.weight_type, index);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int local = (slot + 32 * i) / S::kPerGroup, column = (slot + 32 * i) % S::kPerGroup;
      const int level = min((begin + column) / n_points, static_cast<int>(p.n_levels) - 1);
      const int64_t group = min(first + local, n_groups - 1);
      const float2 softmax = p.reference ? staged.softmax[local] : make_float2(0, 0);
      place_sample(p, levels[level], pixel_of(to_pixels(p, levels[level], group, level), point[i]),
                   weight_of(p, softmax, weight[i]), staged.place + local * S::kRow + column,
                   staged.corners + local * S::kRow + column);
    }
  }
  __syncwarp();
}

// The first channel of a group's head in the value's first row.
template <class T>
__device__ inline const T* head_of_value(const DeformableParams& p, int64_t group) {
  const int64_t query = quotient(group, p.n_heads), head = group - query * p.n_heads;
  const int64_t batch = quotient(query, p.n_queries);
  return static_cast<const T*>(p.value) + batch * p.batch_stride + head * p.head_stride;
}

// One staged sample as the lanes of its group read it.
struct Corners {
  float x, y, weight;  // fractions of the way to the right and lower corners
  uint32_t row;        // of the upper left corner, which may itself lie outside
  int width, held;

  template <int G>
  __device__ Corners(const Staged<G>& staged, int at) {
    const float4 place = staged.place[at];
    x = place.x, y = place.y, weight = place.z, row = __float_as_uint(place.w);
    const int2 corners = staged.corners[at];
    width = corners.x, held = corners.y;
  }
  __device__ bool holds(int k) const { return held >> k & 1; }
  // wraps for a corner outside, which nobody reads
  __device__ int64_t row_of(int k) const {
    return static_cast<int>(row + k % 2 + (k / 2 ? width : 0));
  }
  // zero outside by selection: the weight may be infinite
  __device__ float share(int k) const {
    return holds(k) ? (k % 2 ? x : 1 - x) * (k / 2 ? y : 1 - y) * weight : 0.0f;
  }
};

// How wide a thread reads, and how many threads serve a head.
template <class Element, int CHANNELS, int GROUP>
struct Width {
  using T = Element;
  static constexpr int V = CHANNELS, G = GROUP;
};

// Whether V channels of T can be read at once everywhere; `others` are further addresses.
template <class T, int V>
bool is_aligned(const DeformableParams& p, std::initializer_list<const void*> others) {
  bool aligned = (p.dim | p.batch_stride | p.row_stride | p.head_stride) % V == 0;
  aligned &= reinterpret_cast<uintptr_t>(p.value) % (V * sizeof(T)) == 0;
  for (const void* other : others)
    aligned &= reinterpret_cast<uintptr_t>(other) % (V * sizeof(T)) == 0;
  return aligned;
}

template <class T, int V, class Run>
void run_at_group(int64_t dim, const Run& run) {
  constexpr bool kWide = V * sizeof(T) == 16;
  // fewer kernels for head sizes that nobody chooses for speed
  if constexpr (kWide) {
    if (dim <= 2 * V) return run(Width<T, V, 2>{});
    if (dim <= 4 * V) return run(Width<T, V, 4>{});
  }
  if (dim <= 8 * V) return run(Width<T, V, 8>{});
  if constexpr (kWide) {
    if (dim <= 16 * V) return run(Width<T, V, 16>{});
  }
  return run(Width<T, V, 32>{});
}

// Calls `run` with the Width for this call.
template <class Run>
void run_at_type(const DeformableParams& p, std::initializer_list<const void*> others,
                 const Run& run) {
  const auto at_type = [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = 16 / sizeof(T);
    if (is_aligned<T, V>(p, others)) return run_at_group<T, V>(p.dim, run);
    if (is_aligned<T, 2>(p, others)) return run_at_group<T, 2>(p.dim, run);
    return run_at_group<T, 1>(p.dim, run);
  };
  switch (p.value_type) {
    case ElementType::kFloat32:
      return at_type(float{});
    case ElementType::kBFloat16:
      return at_type(__nv_bfloat16{});
    case ElementType::kFloat16:
      return at_type(__half{});
    default:
      throw std::invalid_argument("value is fp64; the CUDA kernels take fp32, bf16 and fp16");
  }
}

// Throws for what the kernels' 32-bit numbers cannot hold.
inline void check_limits(const DeformableParams& p) {
  const auto limit = [](const char* name, int64_t is, int64_t most) {
    if (is > most)
      throw std::invalid_argument(std::string(name) + " is " + std::to_string(is) +
                                  "; the CUDA kernels take at most " + std::to_string(most));
  };
  limit("the number of rows of value", p.n_rows, INT32_MAX);
  limit("the stride between rows of value", p.row_stride, INT32_MAX);
  limit("the number of channels of all heads", p.n_heads * p.dim, INT32_MAX);
  limit("the number of levels", p.n_levels, kMaxLevels);
  limit("the number of points", p.n_points, INT32_MAX / kMaxLevels);
  if (reinterpret_cast<uintptr_t>(p.points) % 8)
    throw std::invalid_argument("the address of the points is not a multiple of 8 bytes");
}

// Blocks for so many groups, of which a warp serves 32 / G; a kernel strides over the rest.
inline unsigned blocks_for(int64_t n_groups, int group_size) {
  const int64_t per_block = kWarps * (32 / group_size);
  const int64_t blocks = (n_groups + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < INT32_MAX ? blocks : INT32_MAX);
}

}  // namespace survfuse
