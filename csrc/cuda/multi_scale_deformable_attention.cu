// Forward of multi_scale_deformable_attention.  Contract: survfuse/ops, oracle: survfuse/reference,
// files of the same name.  Layout and traffic: docs/kernels.md.
#include "multi_scale_deformable_attention.cuh"

namespace survfuse {
namespace {

// Adds the next kBatch samples of a group; every load is issued before the first is used.
template <class T, int V, int G>
__device__ inline void gather(const Staged<G>& staged, int at, const T* channels, int row_stride,
                              bool reads, float (&sum)[V]) {
  Channels<T, V> word[kBatch][4];
#pragma unroll
  for (int m = 0; m < kBatch; ++m) {
    const Corners corners(staged, at + m);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      word[m][k] = Channels<T, V>::zero();
      if (reads && corners.holds(k))
        word[m][k] = Channels<T, V>::load(channels + corners.row_of(k) * row_stride);
    }
  }
#pragma unroll
  for (int m = 0; m < kBatch; ++m) {
    // read again rather than kept: registers decide how many warps wait for memory together
    const Corners corners(staged, at + m);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float share = corners.share(k);
      float x[V];
      word[m][k].unpack(x);
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += share * x[i];
    }
  }
}

// Grid: any number of blocks over [B * Q * H] groups; a group's lanes stride over its channels.
template <class T, int V, int G>
__global__ void __launch_bounds__(kThreads, 7)
    forward_kernel(const DeformableForward p, int64_t n_groups) {
  Level* levels = static_cast<Level*>(dynamic_shared());
  read_levels(p.in, levels);
  const Staged<G> staged = staged_of_warp<G>(p.in);
  const int local = threadIdx.x % 32 / G, in_group = threadIdx.x % G;
  const int n_samples = static_cast<int>(p.in.n_levels * p.in.n_points);
  const int dim = static_cast<int>(p.in.dim), row_stride = static_cast<int>(p.in.row_stride);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps * Staged<G>::kGroups;
  int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32);
  for (first *= Staged<G>::kGroups; first < n_groups; first += stride) {
    const bool live = first + local < n_groups;
    // lanes without a head keep step with the others, and read and write nothing
    const int64_t group = live ? first + local : n_groups - 1;
    if (p.in.reference) {
      const float2 softmax = softmax_of<G>(p.in, group);
      if (in_group == 0) staged.softmax[local] = softmax;
      if (in_group == 0 && live) static_cast<float*>(p.lse)[group] = softmax.x - logf(softmax.y);
    }
    const T* value = head_of_value<T>(p.in, group);
    for (int chunk = 0; chunk < dim; chunk += G * V) {
      const int c = chunk + in_group * V;
      const bool has = live && c < dim;
      float sum[V] = {};
      for (int begin = 0; begin < n_samples; begin += Staged<G>::kPerGroup) {
        stage<G>(p.in, levels, staged, first, n_groups, begin);
        const int n = min(Staged<G>::kPerGroup, n_samples - begin);
        for (int i = 0; i < n; i += kBatch)
          gather<T, V, G>(staged, local * Staged<G>::kRow + i, value + c, row_stride, has, sum);
      }
      if (has) Channels<T, V>::store(static_cast<T*>(p.out) + group * dim + c, sum);
    }
  }
}

}  // namespace

void deformable_forward_cuda(const DeformableForward& p) {
  const int64_t n_groups = p.in.n_batches * p.in.n_queries * p.in.n_heads;
  if (n_groups == 0) return;
  check_limits(p.in);
  run_at_type(p.in, {p.out}, [&](auto width) {
    using W = decltype(width);
    launch("deformable_forward", forward_kernel<typename W::T, W::V, W::G>,
           blocks_for(n_groups, W::G), kThreads, shared_bytes<W::G>(p.in.n_levels), p.in.stream, p,
           n_groups);
  });
}

}  // namespace survfuse
