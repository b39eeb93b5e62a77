// The MLP of position_biased_attention on strips of pairs: every lane is one pair of query and key.
#pragma once

#include "cpu/arena.h"
#include "cpu/position_biased_attention_plan.h"
#include "cpu/products.h"

namespace survfuse {
namespace {

constexpr int kStripVectors = 3;
// with the vectors of a strip these accumulators fill the registers
#if SURVFUSE_VECTOR_BYTES == 64
constexpr int kUnits = 8, kGradColumns = 4;
#else
constexpr int kUnits = 4, kGradColumns = 2;
#endif
constexpr int kGradRows = 4;

template <class T>
constexpr int64_t kStrip = kStripVectors * kLanes<T>;

template <class T>
struct BiasMlp {
  static constexpr int64_t kS = kStrip<T>;

  struct Layer {
    int64_t n_in, n_out;
    const T *weight, *shift;  // [out, in], [out]
    int64_t at;               // of the weight in the vector of parameters
  };

  int64_t n_layers, n_out;
  Layer layers[4];
  int64_t max_strips;
  T* hidden[3];  // [strips, width, kS] behind their ReLU, later their gradients

  BiasMlp(const BiasedParams& in, int64_t strips)
      : n_layers(in.depth + 1), n_out(heads_of_group(in)), max_strips(strips) {
    int64_t at = 0, size = 2;
    for (int64_t l = 0; l < n_layers; ++l) {
      const int64_t out = l == in.depth ? n_out : in.width;
      const T* weight = static_cast<const T*>(in.parameters) + at;
      layers[l] = {size, out, weight, weight + out * size, at};
      at += out * (size + 1);
      size = out;
    }
  }

  void lay_out(Arena& arena) {
    for (int64_t l = 0; l + 1 < n_layers; ++l)
      hidden[l] = arena.take<T>(max_strips * layers[l].n_out * kS);
  }

  // values [O, kS] at u [2, kS]; what the gradient needs is kept under the strip's number.
  void evaluate(int64_t strip, const T* u, T* values) const {
    const T* x = u;
    for (int64_t l = 0; l < n_layers; ++l) {
      const bool last = l + 1 == n_layers;
      T* y = last ? values : hidden[l] + strip * layers[l].n_out * kS;
      last ? forward<false>(layers[l], x, y) : forward<true>(layers[l], x, y);
      x = y;
    }
  }

  // Adds to the parameters' gradients, unless null, and writes d_u [strips, 2, kS], unless null.
  void differentiate(int64_t n_strips, const T* u, const T* d_values, T* d_parameters,
                     T* d_u) const {
    const T* d = d_values;
    for (int64_t l = n_layers - 1; l >= 0; --l) {
      const Layer& layer = layers[l];
      const T* x = l == 0 ? u : hidden[l - 1];
      if (d_parameters) {
        T* d_weight = d_parameters + layer.at;
        add_weights(layer, n_strips, d, x, d_weight);
        add_shifts(layer, n_strips, d, d_weight + layer.n_out * layer.n_in);
      }
      T* d_x = l == 0 ? d_u : hidden[l - 1];
      for (int64_t s = 0; d_x && s < n_strips; ++s) {
        const T* from = d + s * layer.n_out * kS;
        T* to = d_x + s * layer.n_in * kS;
        l == 0 ? backward<false>(layer, from, to) : backward<true>(layer, from, to);
      }
      d = d_x;
    }
  }

 private:
  // y = W x + b, behind a ReLU or not.
  template <bool RELU>
  static void forward(const Layer& layer, const T* x, T* y) {
    int64_t w = 0;
    for (; w + kUnits <= layer.n_out; w += kUnits) units<kUnits, RELU>(layer, w, x, y + w * kS);
    for (; w < layer.n_out; ++w) units<1, RELU>(layer, w, x, y + w * kS);
  }

  template <int N, bool RELU>
  static void units(const Layer& layer, int64_t w, const T* x, T* y) {
    Vec<T> sum[N][kStripVectors];
    const T* row[N];
    for (int r = 0; r < N; ++r) {
      row[r] = layer.weight + (w + r) * layer.n_in;
      for (int v = 0; v < kStripVectors; ++v) sum[r][v] = splat(layer.shift[w + r]);
    }
    for (int64_t k = 0; k < layer.n_in; ++k) {
      Vec<T> xs[kStripVectors];
      for (int v = 0; v < kStripVectors; ++v) xs[v] = load(x + k * kS + v * kLanes<T>);
      for (int r = 0; r < N; ++r) {
        const Vec<T> weight = splat(row[r][k]);
        for (int v = 0; v < kStripVectors; ++v) sum[r][v] += weight * xs[v];
      }
    }
    for (int r = 0; r < N; ++r)
      for (int v = 0; v < kStripVectors; ++v) {
        const Vec<T> value = sum[r][v];
        // NaN stays
        store(y + r * kS + v * kLanes<T>, RELU ? (value < 0 ? Vec<T>{} : value) : value);
      }
  }

  // d_x = W^T d; in place of what a ReLU gave, zero where that was zero.
  template <bool RELU>
  static void backward(const Layer& layer, const T* d, T* d_x) {
    int64_t k = 0;
    for (; k + kUnits <= layer.n_in; k += kUnits) inputs<kUnits, RELU>(layer, k, d, d_x + k * kS);
    for (; k < layer.n_in; ++k) inputs<1, RELU>(layer, k, d, d_x + k * kS);
  }

  template <int N, bool RELU>
  static void inputs(const Layer& layer, int64_t k, const T* d, T* d_x) {
    Vec<T> sum[N][kStripVectors] = {};
    for (int64_t w = 0; w < layer.n_out; ++w) {
      Vec<T> ds[kStripVectors];
      for (int v = 0; v < kStripVectors; ++v) ds[v] = load(d + w * kS + v * kLanes<T>);
      for (int r = 0; r < N; ++r) {
        const Vec<T> weight = splat(layer.weight[w * layer.n_in + k + r]);
        for (int v = 0; v < kStripVectors; ++v) sum[r][v] += weight * ds[v];
      }
    }
    for (int r = 0; r < N; ++r)
      for (int v = 0; v < kStripVectors; ++v) {
        T* at = d_x + r * kS + v * kLanes<T>;
        store(at, RELU ? (load(at) > 0 ? sum[r][v] : Vec<T>{}) : sum[r][v]);
      }
  }

  // d_weight [out, in] += d x^T, summed over all lanes of all strips.
  static void add_weights(const Layer& layer, int64_t n_strips, const T* d, const T* x,
                          T* d_weight) {
    for (int64_t k = 0, n; k < layer.n_in; k += n) {
      n = k + kGradColumns <= layer.n_in ? kGradColumns : 1;
      for (int64_t w = 0, m; w < layer.n_out; w += m) {
        m = w + kGradRows <= layer.n_out ? kGradRows : 1;
        T* to = d_weight + w * layer.n_in + k;
        if (m > 1 && n > 1)
          outer<kGradRows, kGradColumns>(layer, n_strips, d + w * kS, x + k * kS, to);
        else if (m > 1)
          outer<kGradRows, 1>(layer, n_strips, d + w * kS, x + k * kS, to);
        else if (n > 1)
          outer<1, kGradColumns>(layer, n_strips, d + w * kS, x + k * kS, to);
        else
          outer<1, 1>(layer, n_strips, d + w * kS, x + k * kS, to);
      }
    }
  }

  template <int ROWS, int COLUMNS>
  static void outer(const Layer& layer, int64_t n_strips, const T* d, const T* x, T* to) {
    Vec<T> sum[ROWS][COLUMNS] = {};
    for (int64_t s = 0; s < n_strips; ++s) {
      for (int v = 0; v < kStripVectors; ++v) {
        Vec<T> xs[COLUMNS];
        for (int c = 0; c < COLUMNS; ++c) xs[c] = load(x + c * kS + v * kLanes<T>);
        for (int r = 0; r < ROWS; ++r) {
          const Vec<T> ds = load(d + r * kS + v * kLanes<T>);
          for (int c = 0; c < COLUMNS; ++c) sum[r][c] += ds * xs[c];
        }
      }
      d += layer.n_out * kS;
      x += layer.n_in * kS;
    }
    for (int r = 0; r < ROWS; ++r) {
      T total[COLUMNS];
      horizontal_sums<T, COLUMNS>(sum[r], total);
      for (int c = 0; c < COLUMNS; ++c) to[r * layer.n_in + c] += total[c];
    }
  }

  static void add_shifts(const Layer& layer, int64_t n_strips, const T* d, T* d_shift) {
    for (int64_t w = 0; w < layer.n_out; ++w) {
      Vec<T> sum[kStripVectors] = {};
      for (int64_t s = 0; s < n_strips; ++s)
        for (int v = 0; v < kStripVectors; ++v)
          sum[v] += load(d + (s * layer.n_out + w) * kS + v * kLanes<T>);
      d_shift[w] += horizontal_sum<T>(sum[0] + sum[1] + sum[2]);
    }
  }
};

}  // namespace
}  // namespace survfuse
