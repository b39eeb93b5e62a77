// The CUDA launchers of multi_scale_deformable_attention.
#if SURVFUSE_WITH_CUDA
#include "bindings.h"
#include "multi_scale_deformable_attention.h"

namespace survfuse {
namespace {

DeformableParams deformable_params(const Fields& a) {
  DeformableParams p{};
  p.value = a.address("value");
  p.value_type = a.type("value_type");
  p.batch_stride = a.integer("batch_stride");
  p.row_stride = a.integer("row_stride");
  p.head_stride = a.integer("head_stride");
  p.shapes = a.address<int64_t>("shapes");
  p.points = a.address("points");
  p.weights = a.address("weights");
  p.weight_type = a.type("weight_type");
  p.reference = a.address("reference");
  p.reference_dim = a.integer("reference_dim");
  p.n_batches = a.integer("n_batches");
  p.n_queries = a.integer("n_queries");
  p.n_rows = a.integer("n_rows");
  p.n_heads = a.integer("n_heads");
  p.dim = a.integer("dim");
  p.n_levels = a.integer("n_levels");
  p.n_points = a.integer("n_points");
  p.stream = a.address("stream");
  return p;
}

void forward(const pybind11::dict& fields) {
  const Fields a{fields};
  const DeformableForward p{deformable_params(a), a.address("out"), a.address("lse")};
  pybind11::gil_scoped_release release;
  deformable_forward_cuda(p);
}

void backward(const pybind11::dict& fields) {
  const Fields a{fields};
  DeformableBackward p{};
  p.in = deformable_params(a);
  p.lse = a.address("lse");
  p.d_out = a.address("d_out");
  p.d_value = a.address("d_value");
  p.d_points = a.address("d_points");
  p.d_weights = a.address("d_weights");
  p.d_reference = a.address("d_reference");
  p.fixed_d_value = a.address<int64_t>("fixed_d_value");
  p.fixed_scale = a.address<float>("fixed_scale");
  pybind11::gil_scoped_release release;
  deformable_backward_cuda(p);
}

}  // namespace

void bind_multi_scale_deformable_attention_cuda(pybind11::module_& m) {
  m.def("deformable_forward_cuda", &forward);
  m.def("deformable_backward_cuda", &backward);
}

}  // namespace survfuse
#endif
