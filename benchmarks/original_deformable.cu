// How Deformable DETR's CUDA extension goes about it, as a baseline: one thread per output number
// forward; backward one block per head of a query, a thread a channel, four atomic additions of one
// number per corner, and sums over the channels through shared memory after every sample.
// Written anew after that layout, for benchmarks alone. Weights and positions are fp32, values of
// any type, and the gradient of the value is summed in fp32.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

struct Problem {
  const void* value;      // [B, S, H, C] in
  const int64_t* shapes;  // [L, 2]       in  (height, width)
  const float* points;    // [B, Q, H, L, P, 2] in
  const float* weights;   // [B, Q, H, L, P]    in
  int64_t n_batches, n_rows, n_heads, dim, n_levels, n_points, n_queries;
  void* out;          // [B, Q, H, C]       forward, out
  const void* d_out;  // [B, Q, H, C]       backward, in
  float* d_value;     // [B, S, H, C]       out, zeroed by the caller
  float* d_points;    // [B, Q, H, L, P, 2] out
  float* d_weights;   // [B, Q, H, L, P]    out
  void* stream;
};

__device__ float widened(float x) { return x; }
__device__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widened(__half x) { return __half2float(x); }
__device__ void narrow(float x, float* to) { *to = x; }
__device__ void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }
__device__ void narrow(float x, __half* to) { *to = __float2half_rn(x); }

// Where a sample lies in a level: the offset of each corner's row, -1 outside, and the fractions.
struct Place {
  int64_t row[4];
  float x, y;
  bool inside;
};

__device__ Place place_of(float x, float y, int64_t start, int height, int width) {
  Place place{};
  x = x * width - 0.5f, y = y * height - 0.5f;
  place.inside = x > -1 && y > -1 && x < width && y < height;
  if (!place.inside) return place;
  const int left = static_cast<int>(floorf(x)), top = static_cast<int>(floorf(y));
  place.x = x - left, place.y = y - top;
  for (int k = 0; k < 4; ++k) {
    const int cx = left + k % 2, cy = top + k / 2;
    const bool held = cx >= 0 && cy >= 0 && cx < width && cy < height;
    place.row[k] = held ? start + static_cast<int64_t>(cy) * width + cx : -1;
  }
  return place;
}

__device__ float share(const Place& place, int k) {
  return (k % 2 ? place.x : 1 - place.x) * (k / 2 ? place.y : 1 - place.y);
}

// Grid: a thread per number of out.
template <class T>
__global__ void forward_kernel(const Problem p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t row_stride = p.n_heads * p.dim;
  if (index >= p.n_batches * p.n_queries * row_stride) return;
  const int64_t group = index / p.dim, batch = group / p.n_heads / p.n_queries;
  const T* value = static_cast<const T*>(p.value) + batch * p.n_rows * row_stride +
                   group % p.n_heads * p.dim + index % p.dim;
  int64_t sample = group * p.n_levels * p.n_points, start = 0;
  float sum = 0;
  for (int64_t level = 0; level < p.n_levels; ++level) {
    const int height = p.shapes[2 * level], width = p.shapes[2 * level + 1];
    for (int64_t point = 0; point < p.n_points; ++point, ++sample) {
      const Place place =
          place_of(p.points[2 * sample], p.points[2 * sample + 1], start, height, width);
      if (!place.inside) continue;
      float interpolated = 0;
      for (int k = 0; k < 4; ++k)
        if (place.row[k] >= 0)
          interpolated += share(place, k) * widened(value[place.row[k] * row_stride]);
      sum += p.weights[sample] * interpolated;
    }
    start += static_cast<int64_t>(height) * width;
  }
  narrow(sum, static_cast<T*>(p.out) + index);
}

__device__ float* partial_sums() {
#ifdef __CUDACC__
  extern __shared__ float memory[];
  return memory;
#else
  return static_cast<float*>(emulator::dynamic_shared());
#endif
}

// Adds the block's three numbers per thread into the first thread's: by that thread alone for few
// channels, else by halves.
__device__ void add_up(float* sums) {
  const int n = blockDim.x, thread = threadIdx.x;
  if (n < 64) {
    if (thread > 0) return;
    for (int i = 1; i < n; ++i)
      for (int j = 0; j < 3; ++j) sums[j] += sums[3 * i + j];
    return;
  }
  for (int active = n; active > 1; active = (active + 1) / 2) {
    const int half = (active + 1) / 2;
    if (thread < active / 2)
      for (int j = 0; j < 3; ++j) sums[3 * thread + j] += sums[3 * (thread + half) + j];
    __syncthreads();
  }
}

// Grid: a block per head of a query, a thread per channel.
template <class T>
__global__ void backward_kernel(const Problem p) {
  const int64_t group = blockIdx.x, row_stride = p.n_heads * p.dim;
  const int64_t batch = group / p.n_heads / p.n_queries;
  const int64_t first = batch * p.n_rows * row_stride + group % p.n_heads * p.dim + threadIdx.x;
  const T* value = static_cast<const T*>(p.value) + first;
  float* d_value = p.d_value + first;
  const float d_out = widened(static_cast<const T*>(p.d_out)[group * p.dim + threadIdx.x]);
  float* sums = partial_sums();
  float* own = sums + 3 * threadIdx.x;
  int64_t sample = group * p.n_levels * p.n_points, start = 0;
  for (int64_t level = 0; level < p.n_levels; ++level) {
    const int height = p.shapes[2 * level], width = p.shapes[2 * level + 1];
    for (int64_t point = 0; point < p.n_points; ++point, ++sample) {
      const Place place =
          place_of(p.points[2 * sample], p.points[2 * sample + 1], start, height, width);
      const float weight = p.weights[sample];
      own[0] = own[1] = own[2] = 0;
      if (place.inside)
        for (int k = 0; k < 4; ++k) {
          if (place.row[k] < 0) continue;
          const int64_t at = place.row[k] * row_stride;
          const float dot = d_out * widened(value[at]);
          own[0] += share(place, k) * dot;
          own[1] += (k % 2 ? 1 : -1) * (k / 2 ? place.y : 1 - place.y) * weight * dot * width;
          own[2] += (k / 2 ? 1 : -1) * (k % 2 ? place.x : 1 - place.x) * weight * dot * height;
          atomicAdd(d_value + at, share(place, k) * weight * d_out);
        }
      __syncthreads();
      add_up(sums);
      if (threadIdx.x == 0) {
        p.d_weights[sample] = sums[0];
        p.d_points[2 * sample] = sums[1];
        p.d_points[2 * sample + 1] = sums[2];
      }
      __syncthreads();
    }
    start += static_cast<int64_t>(height) * width;
  }
}

void launch(void (*kernel)(Problem), int64_t grid, int64_t block, size_t shared_bytes,
            const Problem& p) {
#ifdef __CUDACC__
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(p.stream)>>>(p);
#else
  emulator::launch(grid, block, shared_bytes, p.stream, [&] { kernel(p); });
#endif
}

template <class T>
void run(const Problem& p, bool backward) {
  constexpr int64_t kThreads = 1024;
  const int64_t n_groups = p.n_batches * p.n_queries * p.n_heads;
  if (n_groups == 0) return;
  if (backward)
    launch(backward_kernel<T>, n_groups, p.dim, 3 * p.dim * sizeof(float), p);
  else
    launch(forward_kernel<T>, (n_groups * p.dim + kThreads - 1) / kThreads, kThreads, 0, p);
}

}  // namespace

// type: 0 fp32, 1 bf16, 2 fp16. Returns what went wrong, or an empty text.
extern "C" __attribute__((visibility("default"))) const char* original_deformable(const Problem* p,
                                                                                  int type,
                                                                                  int backward) {
  if (type == 0) run<float>(*p, backward != 0);
  if (type == 1) run<__nv_bfloat16>(*p, backward != 0);
  if (type == 2) run<__half>(*p, backward != 0);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? "" : cudaGetErrorString(status);
}
