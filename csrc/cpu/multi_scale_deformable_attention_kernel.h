// multi_scale_deformable_attention on the CPU: samples are located by lanes, then their four
// corners are gathered channel by channel in registers.
#pragma once

#include <limits>

#include "cpu/gradients.h"
#include "cpu/multi_scale_deformable_attention_samples.h"

namespace survfuse {
namespace {

// How a value's elements become registers of T.
template <class T, class Element, int TYPE = 0>
struct Reader {
  using element = Element;
  static Vec<T> whole(const Element* p) {
    if constexpr (TYPE == 1) return widened<T>(p, bf16_to_float);
    if constexpr (TYPE == 2) return widened<T>(p, half_to_float);
    if constexpr (TYPE == 0) return load(p);
  }
  static Vec<T> part(const Element* p, int64_t n) {
    Element values[kLanes<T>] = {};
    std::copy(p, p + n, values);
    return whole(values);
  }
};

// The softmax over all samples of one query and head. The backward computes it again: an
// exponential of logit - lse would lose as many digits as lse has before its point.
template <class T>
struct SampleSoftmax {
  const T* logits;
  int64_t n;
  T top, sum;

  SampleSoftmax(const T* all, int64_t count) : logits(all), n(count), top(all[0]) {
    for (int64_t i = 1; i < n; ++i) top = std::max(top, logits[i]);
    Vec<T> sums = {};
    for (int64_t i = 0; i < n; i += kLanes<T>) sums += exponentials(i);
    sum = horizontal_sum<T>(sums);
  }

  T lse() const { return top + std::log(sum); }
  // Of samples i, i + 1, ...; 0 behind the last.
  Vec<T> weights(int64_t i) const { return exponentials(i) / splat(sum); }

 private:
  Vec<T> exponentials(int64_t i) const {
    return vector_exp(load_first(logits + i, n - i, -std::numeric_limits<T>::infinity()) -
                      splat(top));
  }
};

template <class T, class R>
class DeformableKernel {
  using Element = typename R::element;
  static constexpr int kN = kLanes<T>;
  // registers of channels that are summed at once
  static constexpr int kChunk = SURVFUSE_VECTOR_BYTES == 64 ? 4 : 2;

  const DeformableParams& in;
  DeformableSamples<T> samples;
  T* line;  // [d], padded: a row of out or d_out

 public:
  DeformableKernel(const DeformableParams& params, int64_t first_level, int64_t last_level,
                   char* scratch)
      : in(params) {
    const int64_t used = samples.lay_out(in, first_level, last_level, scratch);
    line = reinterpret_cast<T*>(scratch + used);
  }

  static int64_t scratch_bytes(const DeformableParams& in) {
    DeformableSamples<T> samples;
    return samples.lay_out(in, 0, in.n_levels, nullptr) + round_up(in.dim, kN) * sizeof(T);
  }

  static void forward(const DeformableForward& p, int64_t begin, int64_t end, char* scratch) {
    DeformableKernel kernel(p.in, 0, p.in.n_levels, scratch);
    const DeformableParams& in = p.in;
    const int64_t per_head = in.n_levels * in.n_points;
    for (int64_t query = begin; query < end; ++query) {
      if (in.reference) kernel.samples.set_reference(in, query);
      for (int64_t head = 0; head < in.n_heads; ++head) {
        const int64_t row = query * in.n_heads + head;
        const T* weights = static_cast<const T*>(in.weights) + row * per_head;
        const T lse = kernel.set_weights(weights);
        if (in.reference) static_cast<T*>(p.lse)[row] = lse;
        kernel.samples.locate(static_cast<const T*>(in.points) + 2 * row * per_head);
        kernel.gather(kernel.value(query / in.n_queries, head));
        write_row(kernel.line, in.dim, false, in.value_type, p.out, row * in.dim);
      }
    }
  }

  static void backward(const DeformableBackward& p, const DeformablePiece& piece, char* scratch) {
    DeformableKernel kernel(p.in, piece.first_level, piece.last_level, scratch);
    for (int64_t i = 0; i < p.in.n_queries; ++i)
      kernel.differentiate(p, piece, piece.batch * p.in.n_queries + i);
  }

  static void softmax_backward(const DeformableBackward& p, int64_t begin, int64_t end) {
    const DeformableParams& in = p.in;
    const int64_t per_head = in.n_levels * in.n_points;
    for (int64_t row = begin * in.n_heads; row < end * in.n_heads; ++row) {
      const T* logits = static_cast<const T*>(in.weights) + row * per_head;
      T* gradients = static_cast<T*>(p.d_weights) + row * per_head;
      const SampleSoftmax<T> softmax(logits, per_head);
      Vec<T> mean = {};
      for (int64_t i = 0; i < per_head; i += kN)
        mean += softmax.weights(i) * load_first(gradients + i, per_head - i);
      const Vec<T> all = splat(horizontal_sum<T>(mean));
      for (int64_t i = 0; i < per_head; i += kN) {
        const Vec<T> g = load_first(gradients + i, per_head - i);
        store_first(gradients + i, softmax.weights(i) * (g - all), per_head - i);
      }
    }
  }

 private:
  const Element* value(int64_t batch, int64_t head) const {
    return static_cast<const Element*>(in.value) + batch * in.batch_stride + head * in.head_stride;
  }

  // The weights of this piece's samples, from those (or the logits) of all levels; returns the
  // logsumexp of logits.
  T set_weights(const T* all) {
    if (!in.reference) {
      std::copy(all + samples.first, all + samples.first + samples.n, samples.weight);
      return 0;
    }
    const SampleSoftmax<T> softmax(all, in.n_levels * in.n_points);
    for (int64_t i = 0; i < samples.n; i += kN)
      store_first(samples.weight + i, softmax.weights(samples.first + i), samples.n - i);
    return softmax.lse();
  }

  // line = the weighted sum of all corners.
  void gather(const Element* value) {
    int64_t d = 0;
    for (; d + kChunk * kN <= in.dim; d += kChunk * kN)
      gather_channels<kChunk>(value + d, line + d, R::whole);
    if constexpr (kChunk > 2)
      for (; d + 2 * kN <= in.dim; d += 2 * kN) gather_channels<2>(value + d, line + d, R::whole);
    for (; d + kN <= in.dim; d += kN) gather_channels<1>(value + d, line + d, R::whole);
    if (d < in.dim)
      gather_channels<1>(value + d, line + d,
                         [n = in.dim - d](const Element* p) { return R::part(p, n); });
  }

  template <int CHUNK, class Read>
  void gather_channels(const Element* value, T* out, const Read& read) {
    // one sum for each corner: four chains of additions instead of one
    Vec<T> sum[4][CHUNK] = {};
    const auto add = [&](int corner, const Element* row, T share) {
      for (int c = 0; c < CHUNK; ++c) sum[corner][c] += share * read(row + c * kN);
    };
    for (int64_t i = 0; i < samples.n; ++i) {
      const int found = static_cast<int>(samples.corners[i]);
      const Element* row = value + samples.upper_left[i] * in.row_stride;
      const int64_t right = in.row_stride, below = samples.columns[i] * in.row_stride;
      if (found == DeformableSamples<T>::kAll) {
        add(0, row, samples.share[0][i]);
        add(1, row + right, samples.share[1][i]);
        add(2, row + below, samples.share[2][i]);
        add(3, row + below + right, samples.share[3][i]);
        continue;
      }
      if (found & 1) add(0, row, samples.share[0][i]);
      if (found & 2) add(1, row + right, samples.share[1][i]);
      if (found & 4) add(2, row + below, samples.share[2][i]);
      if (found & 8) add(3, row + below + right, samples.share[3][i]);
    }
    for (int c = 0; c < CHUNK; ++c)
      store(out + c * kN, (sum[0][c] + sum[1][c]) + (sum[2][c] + sum[3][c]));
  }

  void differentiate(const DeformableBackward& p, const DeformablePiece& piece, int64_t query) {
    const int64_t row = query * in.n_heads + piece.head;
    const int64_t first = row * in.n_levels * in.n_points, at = first + samples.first;
    if (in.reference) samples.set_reference(in, query);
    set_weights(static_cast<const T*>(in.weights) + first);
    samples.locate(static_cast<const T*>(in.points) + 2 * at);
    read_gradient(p, row);
    const Element* rows = value(piece.batch, piece.head);
    T* d_rows = static_cast<T*>(p.d_value);
    const int64_t d_stride = in.n_heads * in.dim;
    if (d_rows) d_rows += piece.batch * in.n_rows * d_stride + piece.head * in.dim;
    for (int64_t i = 0; i < samples.n; ++i) scatter(rows, d_rows, d_stride, i);
    write_gradients(p, row, at);
  }

  // line = the row of d_out, zeros behind it.
  void read_gradient(const DeformableBackward& p, int64_t row) {
    const Element* from = static_cast<const Element*>(p.d_out) + row * in.dim;
    int64_t d = 0;
    for (; d + kN <= in.dim; d += kN) store(line + d, R::whole(from + d));
    if (d < in.dim) store(line + d, R::part(from + d, in.dim - d));
  }

  // The dots of a sample's corners with d_out, and the shares of their gradients.
  void scatter(const Element* value, T* d_value, int64_t d_stride, int64_t i) {
    const int found = static_cast<int>(samples.corners[i]);
    const int64_t row = samples.upper_left[i], below = samples.columns[i];
    const int64_t rows[4] = {row, row + 1, row + below, row + below + 1};
    if (found == samples.kAll && in.dim % kN == 0) {
      scatter_whole(value, d_value, d_stride, rows, i);
      return;
    }
    for (int corner = 0; corner < 4; ++corner) {
      samples.dot[corner][i] = 0;
      if (!(found & (1 << corner))) continue;
      const Element* from = value + rows[corner] * in.row_stride;
      T* to = d_value ? d_value + rows[corner] * d_stride : nullptr;
      const T share = samples.share[corner][i];
      Vec<T> dot = {};
      int64_t d = 0;
      for (; d + kN <= in.dim; d += kN) {
        const Vec<T> g = load(line + d);
        dot += R::whole(from + d) * g;
        if (to) store(to + d, load(to + d) + share * g);
      }
      if (d < in.dim) dot += R::part(from + d, in.dim - d) * load(line + d);
      for (; to && d < in.dim; ++d) to[d] += share * line[d];
      samples.dot[corner][i] = horizontal_sum<T>(dot);
    }
  }

  // The same where all corners lie inside and heads fill registers.
  void scatter_whole(const Element* value, T* d_value, int64_t d_stride, const int64_t* rows,
                     int64_t i) {
    Vec<T> dot[4] = {}, share[4];
    for (int corner = 0; corner < 4; ++corner) share[corner] = splat(samples.share[corner][i]);
    for (int64_t d = 0; d < in.dim; d += kN) {
      const Vec<T> g = load(line + d);
      for (int corner = 0; corner < 4; ++corner)
        dot[corner] += R::whole(value + rows[corner] * in.row_stride + d) * g;
      if (!d_value) continue;
      for (int corner = 0; corner < 4; ++corner) {
        T* to = d_value + rows[corner] * d_stride + d;
        store(to, load(to) + share[corner] * g);
      }
    }
    T sums[4];
    horizontal_sums<T, 4>(dot, sums);
    for (int corner = 0; corner < 4; ++corner) samples.dot[corner][i] = sums[corner];
  }

  void write_gradients(const DeformableBackward& p, int64_t row, int64_t at) {
    T* d_weights = static_cast<T*>(p.d_weights) + at;
    T* d_points = static_cast<T*>(p.d_points) + 2 * at;
    for (int64_t i = 0; i < samples.n; i += kN) {
      const Vec<T> fx = load(samples.fraction_x + i), fy = load(samples.fraction_y + i);
      const Vec<T> w = load(samples.weight + i);
      Vec<T> dot[4];
      for (int corner = 0; corner < 4; ++corner) dot[corner] = load(samples.dot[corner] + i);
      const Vec<T> upper = dot[1] - dot[0], lower = dot[3] - dot[2];
      const Vec<T> left = dot[2] - dot[0], right = dot[3] - dot[1];
      const Vec<T> above = dot[0] + fx * upper, below = dot[2] + fx * lower;
      store_first(d_weights + i, above + fy * (below - above), samples.n - i);
      // gradients of the pixel, kept where the dots were
      store(samples.dot[0] + i, w * (upper + fy * (lower - upper)));
      store(samples.dot[1] + i, w * (left + fx * (right - left)));
    }
    for (int64_t i = 0; i < samples.n; ++i) {
      // what is no number lies outside and has no gradient
      const bool taken = samples.corners[i] != 0;
      d_points[2 * i] = taken ? samples.dot[0][i] * samples.step_x[i] : 0;
      d_points[2 * i + 1] = taken ? samples.dot[1][i] * samples.step_y[i] : 0;
    }
    if (p.d_reference) write_reference_gradient(p, row);
  }

  void write_reference_gradient(const DeformableBackward& p, int64_t row) {
    const int64_t first_level = samples.first / in.n_points;
    const T* points =
        static_cast<const T*>(in.points) + 2 * (row * in.n_levels * in.n_points + samples.first);
    T* target =
        static_cast<T*>(p.d_reference) + (row * in.n_levels + first_level) * in.reference_dim;
    const T half = T(0.5) / in.n_points;
    for (int64_t i = 0; i < samples.n; ++i) {
      T* to = target + i / in.n_points * in.reference_dim;
      if (i % in.n_points == 0) std::fill(to, to + in.reference_dim, T(0));
      const T d_x = samples.dot[0][i] * samples.width[i],
              d_y = samples.dot[1][i] * samples.height[i];
      to[0] += d_x;
      to[1] += d_y;
      if (in.reference_dim == 4 && samples.corners[i]) {
        to[2] += d_x * points[2 * i] * half;
        to[3] += d_y * points[2 * i + 1] * half;
      }
    }
  }
};

template <class T>
struct DeformableByType {
  template <class Run>
  static void run(ElementType type, const Run& with) {
    if constexpr (std::is_same_v<T, double>) {
      with(Reader<double, double>{});
    } else if (type == ElementType::kBFloat16) {
      with(Reader<float, uint16_t, 1>{});
    } else if (type == ElementType::kFloat16) {
      with(Reader<float, uint16_t, 2>{});
    } else {
      with(Reader<float, float>{});
    }
  }
};

template <class T>
DeformableEngine make_deformable_engine() {
  return {[](const DeformableParams& in) {
            return DeformableKernel<T, Reader<T, T>>::scratch_bytes(in);
          },
          [](const DeformableForward& p, int64_t begin, int64_t end, char* scratch) {
            DeformableByType<T>::run(p.in.value_type, [&](auto reader) {
              DeformableKernel<T, decltype(reader)>::forward(p, begin, end, scratch);
            });
          },
          [](const DeformableBackward& p, const DeformablePiece& piece, char* scratch) {
            DeformableByType<T>::run(p.in.value_type, [&](auto reader) {
              DeformableKernel<T, decltype(reader)>::backward(p, piece, scratch);
            });
          },
          &DeformableKernel<T, Reader<T, T>>::softmax_backward};
}

}  // namespace
}  // namespace survfuse
