// Backward of multi_scale_deformable_attention.  Contract: survfuse/ops, oracle:
// survfuse/reference, files of the same name.  Layout and traffic: docs/kernels.md.
#include "multi_scale_deformable_attention.cuh"

namespace survfuse {
namespace {

// Of one sample, before its weight: d_out . sample, and its slopes along x and y.
struct Slopes {
  float sample, x, y;
};

// Sums over a group of both samples of a batch: the first half of its lanes ends with the first
// sample's sums, the other half with the second's. Half the shuffles of two sums.
template <int G>
__device__ inline Slopes summed(const Slopes (&part)[kBatch]) {
  static_assert(kBatch == 2, "one exchange of halves");
  const bool second = threadIdx.x % G >= G / 2;
  const auto exchanged = [&](float a, float b) {
    return (second ? b : a) + __shfl_xor_sync(kWholeWarp, second ? a : b, G / 2);
  };
  return {group_sum<G / 2>(exchanged(part[0].sample, part[1].sample)),
          group_sum<G / 2>(exchanged(part[0].x, part[1].x)),
          group_sum<G / 2>(exchanged(part[0].y, part[1].y))};
}

// Adds the samples' share of d_value at this lane's channels.
template <int V, int G>
__device__ inline void scatter(const DeformableBackward& p, const Staged<G>& staged, int at,
                               int64_t target, const float (&d_out)[V], float2 scale) {
  const int stride = static_cast<int>(p.in.n_heads * p.in.dim);
  // rolled, and the slots read again: registers are what limits this kernel
#pragma unroll 1
  for (int m = 0; m < kBatch; ++m) {
    const Corners corners(staged, at + m);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (!corners.holds(k)) continue;
      const float share = corners.share(k);
      float x[V];
#pragma unroll
      for (int i = 0; i < V; ++i) x[i] = share * d_out[i];
      const int64_t to = target + corners.row_of(k) * stride;
      if (p.fixed_d_value) {
        add_fixed<V>(p.fixed_d_value + to, x, scale);
      } else {
        add_atomically<V>(static_cast<float*>(p.d_value) + to, x);
      }
    }
  }
}

// Adds d_out . corner over this lane's channels for every corner of a batch. The additions to
// d_value wait for nothing and are sent off while the corners are on their way.
template <class T, int V, int G>
__device__ inline void visit_corners(const DeformableBackward& p, const Staged<G>& staged, int at,
                                     const T* channels, int64_t target, const float (&d_out)[V],
                                     float2 scale, float (&dot)[kBatch][4]) {
  Channels<T, V> word[kBatch][4];
  const int row_stride = static_cast<int>(p.in.row_stride);
  bool holds[kBatch][4];
#pragma unroll
  for (int m = 0; m < kBatch; ++m) {
    const Corners corners(staged, at + m);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      word[m][k] = Channels<T, V>::zero();
      holds[m][k] = corners.holds(k);
      if (holds[m][k]) word[m][k] = Channels<T, V>::load(channels + corners.row_of(k) * row_stride);
    }
  }
  if (p.d_value) scatter<V, G>(p, staged, at, target, d_out, scale);
#pragma unroll
  for (int m = 0; m < kBatch; ++m)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float x[V], sum = 0;
      word[m][k].unpack(x);
#pragma unroll
      for (int i = 0; i < V; ++i) sum += d_out[i] * x[i];
      // by selection: d_out may be infinite where a corner is no part of the image
      dot[m][k] += holds[m][k] ? sum : 0.0f;
    }
}

__device__ inline Slopes slopes_of(const Corners& at, const float (&dot)[4]) {
  const float above = (1 - at.x) * dot[0] + at.x * dot[1];
  const float below = (1 - at.x) * dot[2] + at.x * dot[3];
  return {(1 - at.y) * above + at.y * below,
          (1 - at.y) * (dot[1] - dot[0]) + at.y * (dot[3] - dot[2]),
          (1 - at.x) * (dot[2] - dot[0]) + at.x * (dot[3] - dot[1])};
}

// One group's channels: where they lie, and this lane's gradients.
template <class T, int V>
struct Head {
  const T* value;
  const T* gradient;
  int64_t target;  // its first channel in d_value's first row
  float d_out[V];
  bool live;
};

template <class T, int V>
__device__ inline void load_gradient(Head<T, V>& head, int c, int dim) {
  Channels<T, V> word = Channels<T, V>::zero();
  if (head.live && c < dim) word = Channels<T, V>::load(head.gradient + c);
  word.unpack(head.d_out);
}

template <class T, int V, int G>
__device__ inline Head<T, V> head_of(const DeformableBackward& p, int64_t group, bool live) {
  Head<T, V> head;
  const int64_t query = quotient(group, p.in.n_heads), index = group - query * p.in.n_heads;
  const int64_t rows = quotient(query, p.in.n_queries) * p.in.n_rows;
  head.value = head_of_value<T>(p.in, group);
  head.gradient = static_cast<const T*>(p.d_out) + group * p.in.dim;
  head.target = (rows * p.in.n_heads + index) * p.in.dim;
  head.live = live;
  load_gradient(head, threadIdx.x % G * V, static_cast<int>(p.in.dim));
  return head;
}

// A group's staged samples: their slots end with (d_x, d_y) in pixels and d_weight.
template <class T, int V, int G>
__device__ inline void visit_staged(const DeformableBackward& p, const Staged<G>& staged, int n,
                                    Head<T, V>& head, float2 scale) {
  const int dim = static_cast<int>(p.in.dim), in_group = threadIdx.x % G;
  const int row = threadIdx.x % 32 / G * Staged<G>::kRow;
  for (int i = 0; i < n; i += kBatch) {
    float dot[kBatch][4] = {};
    for (int c = in_group * V; head.live && c < dim; c += G * V) {
      // one stride over the channels: the gradients stay in registers
      if (dim > G * V) load_gradient(head, c, dim);
      visit_corners<T, V, G>(p, staged, row + i, head.value + c, head.target + c, head.d_out, scale,
                             dot);
    }
    const Slopes part[kBatch] = {slopes_of(Corners(staged, row + i), dot[0]),
                                 slopes_of(Corners(staged, row + i + 1), dot[1])};
    const Slopes sum = summed<G>(part);
    const int slot = row + i + in_group / (G / 2);
    const float weight = staged.place[slot].z;
    // the group's lanes have read the slots
    __syncwarp();
    if (in_group % (G / 2) == 0)
      staged.place[slot] = make_float4(sum.x * weight, sum.y * weight, sum.sample, 0);
  }
  __syncwarp();
}

// Gradients of staged points and weights, a lane a sample.
template <int G>
__device__ inline void write_samples(const DeformableBackward& p, const Level* levels,
                                     const Staged<G>& staged, int64_t first, int64_t n_groups,
                                     int begin) {
  using S = Staged<G>;
  const int n_points = static_cast<int>(p.in.n_points);
  const int n_samples = static_cast<int>(p.in.n_levels) * n_points;
  for (int slot = threadIdx.x % 32; slot < kSlots; slot += 32) {
    const int local = slot / S::kPerGroup, sample = begin + slot % S::kPerGroup;
    const int64_t group = first + local;
    if (sample >= n_samples || group >= n_groups) continue;
    const float4 slopes = staged.place[local * S::kRow + slot % S::kPerGroup];
    const int64_t index = group * n_samples + sample;
    if (p.d_weights) static_cast<float*>(p.d_weights)[index] = slopes.z;
    if (!p.d_points) continue;
    const int level = sample / n_points;
    const float2 step = to_pixels(p.in, levels[level], group, level).step;
    // by selection: a box that no sample needed may be NaN
    static_cast<float2*>(p.d_points)[index] =
        make_float2(slopes.x == 0 ? 0 : slopes.x * step.x, slopes.y == 0 ? 0 : slopes.y * step.y);
  }
}

// Gradients of reference points, summed over a level's staged points in order, a lane a level.
template <int G>
__device__ inline void write_reference(const DeformableBackward& p, const Level* levels,
                                       const Staged<G>& staged, int64_t first, int64_t n_groups,
                                       int begin, int n) {
  const int n_points = static_cast<int>(p.in.n_points), n_levels = static_cast<int>(p.in.n_levels);
  const int dim = static_cast<int>(p.in.reference_dim);
  const int first_level = begin / n_points;
  const int count = (begin + n - 1) / n_points - first_level + 1;
  const float half = 0.5f / static_cast<float>(p.in.n_points);
  for (int i = threadIdx.x % 32; i < Staged<G>::kGroups * count; i += 32) {
    const int local = i / count, level = first_level + i % count;
    const int64_t group = first + local;
    if (group >= n_groups) continue;
    const int from = max(level * n_points, begin), to = min((level + 1) * n_points, begin + n);
    const float4* slopes = staged.place + local * Staged<G>::kRow - begin;
    const float2* points = static_cast<const float2*>(p.in.points) + group * n_levels * n_points;
    float x = 0, y = 0, width = 0, height = 0;
    for (int s = from; s < to; ++s) {
      x += slopes[s].x, y += slopes[s].y;
      // by selection: a point that is not sampled may be NaN
      if (dim == 4 && slopes[s].x != 0) width += slopes[s].x * (__ldg(points + s).x * half);
      if (dim == 4 && slopes[s].y != 0) height += slopes[s].y * (__ldg(points + s).y * half);
    }
    float* out = static_cast<float*>(p.d_reference) + (group * n_levels + level) * dim;
    // an earlier chunk of samples may have begun the level
    const bool begun = from > level * n_points;
    const float w = levels[level].width, h = levels[level].height;
    const auto add = [&](int j, float sum) { out[j] = sum + (begun ? out[j] : 0); };
    add(0, x * w);
    add(1, y * h);
    if (dim == 2) continue;
    add(2, width * w);
    add(3, height * h);
  }
}

// From gradients of the weights to those of the logits, in place.
template <int G>
__device__ inline void through_softmax(const DeformableBackward& p, float2 softmax, int64_t group,
                                       bool live) {
  const int n_samples = static_cast<int>(p.in.n_levels * p.in.n_points);
  const int64_t base = group * n_samples;
  float* gradient = static_cast<float*>(p.d_weights) + base;
  __syncwarp();
  const auto weight = [&](int s) {
    return weight_of(p.in, softmax, load_number(p.in.weights, p.in.weight_type, base + s));
  };
  float mean = 0;
  for (int s = threadIdx.x % G; s < n_samples; s += G) mean += weight(s) * gradient[s];
  mean = group_sum<G>(mean);
  for (int s = threadIdx.x % G; live && s < n_samples; s += G)
    gradient[s] = weight(s) * (gradient[s] - mean);
}

// Grid: any number of blocks over [B * Q * H] groups; a group's lanes stride over its channels.
template <class T, int V, int G>
__global__ void __launch_bounds__(kThreads, 4)
    backward_kernel(const DeformableBackward p, int64_t n_groups) {
  Level* levels = static_cast<Level*>(dynamic_shared());
  read_levels(p.in, levels);
  const Staged<G> staged = staged_of_warp<G>(p.in);
  const int local = threadIdx.x % 32 / G;
  const int n_samples = static_cast<int>(p.in.n_levels * p.in.n_points);
  float2 scale = make_float2(0, 0);
  if (p.fixed_d_value) scale = make_float2(__ldg(p.fixed_scale), __ldg(p.fixed_scale + 1));
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps * Staged<G>::kGroups;
  int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32);
  for (first *= Staged<G>::kGroups; first < n_groups; first += stride) {
    const bool live = first + local < n_groups;
    const int64_t group = live ? first + local : n_groups - 1;
    float2 softmax = make_float2(0, 0);
    if (p.in.reference) {
      softmax = softmax_of<G>(p.in, group);
      if (threadIdx.x % G == 0) staged.softmax[local] = softmax;
    }
    Head<T, V> head = head_of<T, V, G>(p, group, live);
    for (int begin = 0; begin < n_samples; begin += Staged<G>::kPerGroup) {
      stage<G>(p.in, levels, staged, first, n_groups, begin);
      const int n = min(Staged<G>::kPerGroup, n_samples - begin);
      visit_staged<T, V, G>(p, staged, n, head, scale);
      write_samples<G>(p, levels, staged, first, n_groups, begin);
      if (p.d_reference) write_reference<G>(p, levels, staged, first, n_groups, begin, n);
    }
    if (p.in.reference && p.d_weights) through_softmax<G>(p, softmax, group, live);
  }
}

__global__ void __launch_bounds__(256)
    widen_kernel(const int64_t* fixed, const float* scale, float* out, int64_t n) {
  const double unit = 1.0 / (static_cast<double>(scale[0]) * static_cast<double>(scale[1]));
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride)
    out[i] = static_cast<float>(static_cast<double>(fixed[i]) * unit);
}

}  // namespace

void deformable_backward_cuda(const DeformableBackward& p) {
  const int64_t n_groups = p.in.n_batches * p.in.n_queries * p.in.n_heads;
  if (n_groups > 0) {
    check_limits(p.in);
    run_at_type(p.in, {p.d_out, p.d_value}, [&](auto width) {
      using W = decltype(width);
      launch("deformable_backward", backward_kernel<typename W::T, W::V, W::G>,
             blocks_for(n_groups, W::G), kThreads, shared_bytes<W::G>(p.in.n_levels), p.in.stream,
             p, n_groups);
    });
  }
  const int64_t n_values = p.in.n_batches * p.in.n_rows * p.in.n_heads * p.in.dim;
  if (p.fixed_d_value && n_values > 0) {
    const int64_t blocks = (n_values + 255) / 256;
    launch("deformable_backward, widening", widen_kernel,
           static_cast<unsigned>(blocks < 65536 ? blocks : 65536), 256, 0, p.in.stream,
           p.fixed_d_value, p.fixed_scale, static_cast<float*>(p.d_value), n_values);
  }
}

}  // namespace survfuse
