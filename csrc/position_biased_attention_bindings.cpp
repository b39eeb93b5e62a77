// Binds the launchers of position_biased_attention.
#include <tuple>

#include "bindings.h"
#include "position_biased_attention.h"

namespace py = pybind11;

namespace survfuse {
namespace {

BiasedRows rows(const Fields& a, const char* name) {
  const auto r = a.fields[name].cast<std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>>();
  return {reinterpret_cast<const void*>(std::get<0>(r)), static_cast<ElementType>(std::get<1>(r)),
          std::get<2>(r), std::get<3>(r), std::get<4>(r)};
}

BiasedParams params(const Fields& a) {
  BiasedParams p{};
  p.query = rows(a, "query");
  p.key = rows(a, "key");
  p.value = rows(a, "value");
  p.query_pos = a.address("query_pos");
  p.key_pos = a.address("key_pos");
  p.parameters = a.address("parameters");
  p.reach = a.address("reach");
  p.depth = a.integer("depth");
  p.width = a.integer("width");
  p.table_size = a.integer("table_size");
  p.starts = a.address<const int64_t>("starts");
  p.lengths = a.address<const int64_t>("lengths");
  p.n_bags = a.integer("n_bags");
  p.n_heads = a.integer("n_heads");
  p.n_groups = a.integer("n_groups");
  p.n_keys = a.integer("n_keys");
  p.dim = a.integer("dim");
  p.value_dim = a.integer("value_dim");
  p.scale = a.real("scale");
  p.dropout_p = a.real("dropout_p");
  p.seed = a.bits("seed");
  p.workspace = a.address("workspace");
  p.n_threads = static_cast<int>(a.integer("n_threads"));
  p.isa = a.isa();
  return p;
}

void forward(const py::dict& fields) {
  const Fields a{fields};
  const BiasedForward p{params(a), a.address("out"), a.address("lse")};
  py::gil_scoped_release release;
  position_biased_attention_forward_cpu(p);
}

void backward(const py::dict& fields) {
  const Fields a{fields};
  BiasedBackward p{};
  p.in = params(a);
  p.out = rows(a, "out");
  p.d_out = rows(a, "d_out");
  p.lse = a.address("lse");
  p.d_lse = a.address("d_lse");
  p.d_query = a.address("d_query");
  p.d_query_pos = a.address("d_query_pos");
  p.d_key = a.address("d_key");
  p.d_value = a.address("d_value");
  p.d_key_pos = a.address("d_key_pos");
  p.d_parameters = a.address("d_bias");
  py::gil_scoped_release release;
  position_biased_attention_backward_cpu(p);
}

int64_t workspace(const py::dict& fields, bool is_backward) {
  return position_biased_attention_workspace(params(Fields{fields}), is_backward);
}

}  // namespace

void bind_position_biased_attention(py::module_& m) {
  m.def("position_biased_attention_workspace", &workspace);
  m.def("position_biased_attention_forward", &forward);
  m.def("position_biased_attention_backward", &backward);
}

}  // namespace survfuse
