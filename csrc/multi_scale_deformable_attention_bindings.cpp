// survfuse._native: multi_scale_deformable_attention.
#include "bindings.h"
#include "multi_scale_deformable_attention.h"

namespace py = pybind11;

namespace survfuse {
namespace {

DeformableParams deformable_params(const Fields& a) {
  DeformableParams p{};
  p.value = a.address("value");
  p.value_type = a.type("value_type");
  p.batch_stride = a.integer("batch_stride");
  p.row_stride = a.integer("row_stride");
  p.head_stride = a.integer("head_stride");
  p.shapes = a.address<const int64_t>("shapes");
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
  p.n_threads = static_cast<int>(a.integer("n_threads"));
  p.isa = a.isa();
  p.stream = a.address("stream");
  return p;
}

DeformableForward forward_params(const Fields& a) {
  return {deformable_params(a), a.address("out"), a.address("lse")};
}

DeformableBackward backward_params(const Fields& a) {
  DeformableBackward p{};
  p.in = deformable_params(a);
  p.d_out = a.address("d_out");
  p.d_value = a.address("d_value");
  p.d_points = a.address("d_points");
  p.d_weights = a.address("d_weights");
  p.d_reference = a.address("d_reference");
  return p;
}

#if SURVFUSE_WITH_CUDA
DeformableBackward cuda_backward_params(const Fields& a) {
  DeformableBackward p = backward_params(a);
  p.fixed_d_value = a.address<int64_t>("fixed_d_value");
  p.fixed_scale = a.address<const float>("fixed_scale");
  return p;
}
#endif

// A launcher of parameters that `read` makes of a dict, without the GIL.
template <class Params>
auto launcher(Params (*read)(const Fields&), void (*launch)(const Params&)) {
  return [read, launch](const py::dict& fields) {
    const Params p = read(Fields{fields});
    py::gil_scoped_release release;
    launch(p);
  };
}

}  // namespace

void bind_multi_scale_deformable_attention(py::module_& m) {
  m.def("deformable_forward", launcher(&forward_params, &deformable_forward_cpu));
  m.def("deformable_backward", launcher(&backward_params, &deformable_backward_cpu));
#if SURVFUSE_WITH_CUDA
  m.def("deformable_forward_cuda", launcher(&forward_params, &deformable_forward_cuda));
  m.def("deformable_backward_cuda", launcher(&cuda_backward_params, &deformable_backward_cuda));
#endif
}

}  // namespace survfuse
