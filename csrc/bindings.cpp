// survfuse._native: one line per launcher. Pointers are integers; Python checks before it calls.
#include "bindings.h"

#include <pybind11/pybind11.h>

#include <string>
#include <tuple>

#include "cpu/cpu_features.h"
#include "cpu/parallel.h"
#include "cross_attention.h"
#include "device.h"
#include "gated_attention_pool.h"
#include "pool_bag.h"

namespace py = pybind11;
using namespace survfuse;

namespace {

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

PoolBagParams pool_bag_params(const py::dict& a) {
  PoolBagParams p{};
  p.rows = pointer(a["rows"].cast<uintptr_t>());
  p.bag = pointer(a["bag"].cast<uintptr_t>());
  p.bias = pointer(a["bias"].cast<uintptr_t>());
  p.starts = static_cast<const int64_t*>(pointer(a["starts"].cast<uintptr_t>()));
  p.lengths = static_cast<const int64_t*>(pointer(a["lengths"].cast<uintptr_t>()));
  p.mean = pointer(a["mean"].cast<uintptr_t>());
  p.rstd = pointer(a["rstd"].cast<uintptr_t>());
  p.n_bags = a["n_bags"].cast<int64_t>();
  p.n_rows = a["n_rows"].cast<int64_t>();
  p.dim = a["dim"].cast<int64_t>();
  p.bag_stride = a["bag_stride"].cast<int64_t>();
  p.bag_type = static_cast<ElementType>(a["bag_type"].cast<int>());
  p.scale = a["scale"].cast<double>();
  p.normalize = a["normalize"].cast<bool>();
  p.eps = a["eps"].cast<double>();
  p.dropout_p = a["dropout_p"].cast<double>();
  p.seed = a["seed"].cast<uint64_t>();
  p.workspace = pointer(a["workspace"].cast<uintptr_t>());
  p.n_threads = a["n_threads"].cast<int>();
  p.isa = static_cast<CpuIsa>(a["isa"].cast<int>());
  return p;
}

void pool_bag_forward(const py::dict& a) {
  const PoolBagForward p{pool_bag_params(a), pointer(a["pooled"].cast<uintptr_t>()),
                         pointer(a["lse"].cast<uintptr_t>()),
                         pointer(a["weight_sum"].cast<uintptr_t>())};
  py::gil_scoped_release release;
  pool_bag_forward_cpu(p);
}

void pool_bag_backward(const py::dict& a) {
  PoolBagBackward p{};
  p.in = pool_bag_params(a);
  p.lse = pointer(a["lse"].cast<uintptr_t>());
  p.delta = pointer(a["delta"].cast<uintptr_t>());
  p.d_pooled = pointer(a["d_pooled"].cast<uintptr_t>());
  p.d_weight_sum = pointer(a["d_weight_sum"].cast<uintptr_t>());
  p.d_logit_sum = pointer(a["d_logit_sum"].cast<uintptr_t>());
  p.d_rows = pointer(a["d_rows"].cast<uintptr_t>());
  p.d_bag = pointer(a["d_bag"].cast<uintptr_t>());
  p.d_bias = pointer(a["d_bias"].cast<uintptr_t>());
  p.d_bag_type = static_cast<ElementType>(a["d_bag_type"].cast<int>());
  p.overlapping = a["overlapping"].cast<bool>();
  py::gil_scoped_release release;
  pool_bag_backward_cpu(p);
}

int64_t workspace(int64_t n_bags, int64_t n_rows, int64_t dim, int64_t total, int bag_type,
                  int n_threads) {
  return pool_bag_workspace(n_bags, n_rows, dim, total, static_cast<ElementType>(bag_type),
                            n_threads);
}

HeadRows head_rows(const py::dict& a, const std::string& name) {
  const auto rows = a[name.c_str()].cast<std::tuple<uintptr_t, int, int64_t, int64_t>>();
  return {pointer(std::get<0>(rows)), static_cast<ElementType>(std::get<1>(rows)),
          std::get<2>(rows), std::get<3>(rows)};
}

CrossAttentionParams cross_attention_params(const py::dict& a) {
  const auto address = [&](const char* name) { return pointer(a[name].cast<uintptr_t>()); };
  CrossAttentionParams p{};
  p.query = head_rows(a, "query");
  p.key = head_rows(a, "key");
  p.value = head_rows(a, "value");
  p.bias = address("bias");
  p.bias_row_stride = a["bias_row_stride"].cast<int64_t>();
  p.bias_head_stride = a["bias_head_stride"].cast<int64_t>();
  p.query_starts = static_cast<const int64_t*>(address("query_starts"));
  p.query_lengths = static_cast<const int64_t*>(address("query_lengths"));
  p.key_starts = static_cast<const int64_t*>(address("key_starts"));
  p.key_lengths = static_cast<const int64_t*>(address("key_lengths"));
  p.n_bags = a["n_bags"].cast<int64_t>();
  p.n_heads = a["n_heads"].cast<int64_t>();
  p.dim = a["dim"].cast<int64_t>();
  p.value_dim = a["value_dim"].cast<int64_t>();
  p.few_queries = a["few_queries"].cast<bool>();
  p.scale = a["scale"].cast<double>();
  p.normalize = a["normalize"].cast<bool>();
  p.eps = a["eps"].cast<double>();
  p.mean = address("mean");
  p.rstd = address("rstd");
  p.dropout_p = a["dropout_p"].cast<double>();
  p.seed = a["seed"].cast<uint64_t>();
  p.workspace = address("workspace");
  p.n_threads = a["n_threads"].cast<int>();
  p.isa = static_cast<CpuIsa>(a["isa"].cast<int>());
  return p;
}

void cross_attention_forward(const py::dict& a) {
  const CrossAttentionForward p{cross_attention_params(a), pointer(a["out"].cast<uintptr_t>()),
                                static_cast<ElementType>(a["out_type"].cast<int>()),
                                pointer(a["lse"].cast<uintptr_t>())};
  py::gil_scoped_release release;
  cross_attention_forward_cpu(p);
}

void cross_attention_backward(const py::dict& a) {
  const auto address = [&](const char* name) { return pointer(a[name].cast<uintptr_t>()); };
  CrossAttentionBackward p{};
  p.in = cross_attention_params(a);
  p.lse = address("lse");
  p.mean = address("mean_gradient");
  p.d_out = head_rows(a, "d_out");
  p.d_lse = address("d_lse");
  p.d_query = address("d_query");
  p.d_key = address("d_key");
  p.d_value = address("d_value");
  p.d_bias = address("d_bias");
  p.d_long_type = static_cast<ElementType>(a["d_long_type"].cast<int>());
  p.overlapping = a["overlapping"].cast<bool>();
  py::gil_scoped_release release;
  cross_attention_backward_cpu(p);
}

int64_t attention_workspace(const py::dict& a) {
  return cross_attention_workspace(cross_attention_params(a));
}

GatedParams gated_params(const py::dict& a) {
  const auto address = [&](const char* name) { return pointer(a[name].cast<uintptr_t>()); };
  GatedParams p{};
  p.bag = address("bag");
  p.bag_type = static_cast<ElementType>(a["bag_type"].cast<int>());
  p.bag_stride = a["bag_stride"].cast<int64_t>();
  p.w_tanh = address("w_tanh");
  p.w_gate = address("w_gate");
  p.b_tanh = address("b_tanh");
  p.b_gate = address("b_gate");
  p.w_score = address("w_score");
  p.b_score = address("b_score");
  p.bias = address("bias");
  p.starts = static_cast<const int64_t*>(address("starts"));
  p.lengths = static_cast<const int64_t*>(address("lengths"));
  p.n_bags = a["n_bags"].cast<int64_t>();
  p.dim = a["dim"].cast<int64_t>();
  p.n_hidden = a["n_hidden"].cast<int64_t>();
  p.n_pools = a["n_pools"].cast<int64_t>();
  p.dropout_p = a["dropout_p"].cast<double>();
  p.seed = a["seed"].cast<uint64_t>();
  p.workspace = address("workspace");
  p.n_threads = a["n_threads"].cast<int>();
  p.isa = static_cast<CpuIsa>(a["isa"].cast<int>());
  return p;
}

void gated_attention_pool_forward(const py::dict& a) {
  const GatedForward p{gated_params(a), pointer(a["pooled"].cast<uintptr_t>()),
                       pointer(a["lse"].cast<uintptr_t>())};
  py::gil_scoped_release release;
  gated_attention_pool_forward_cpu(p);
}

void gated_attention_pool_backward(const py::dict& a) {
  const auto address = [&](const char* name) { return pointer(a[name].cast<uintptr_t>()); };
  GatedBackward p{};
  p.in = gated_params(a);
  p.lse = address("lse");
  p.delta = address("delta");
  p.d_pooled = address("d_pooled");
  p.d_w_tanh = address("d_w_tanh");
  p.d_w_gate = address("d_w_gate");
  p.d_b_tanh = address("d_b_tanh");
  p.d_b_gate = address("d_b_gate");
  p.d_w_score = address("d_w_score");
  p.d_bag = address("d_bag");
  p.d_bias = address("d_bias");
  p.d_bag_type = static_cast<ElementType>(a["d_bag_type"].cast<int>());
  p.overlapping = a["overlapping"].cast<bool>();
  py::gil_scoped_release release;
  gated_attention_pool_backward_cpu(p);
}

int64_t gated_workspace(const py::dict& a, bool backward) {
  return gated_attention_pool_workspace(gated_params(a), backward);
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cuda"] = static_cast<bool>(SURVFUSE_WITH_CUDA);
  py::list isas;
  for (int isa = 1; isa <= static_cast<int>(CpuIsa::kAvx512Bf16); ++isa)
    if (SURVFUSE_X86 || isa == 1) isas.append(isa_name(static_cast<CpuIsa>(isa)));
  info["cpu_isas"] = isas;
  py::list archs;
#if SURVFUSE_WITH_CUDA
  for (const char* arch : {"sm_80", "sm_90a", "sm_100", "sm_120", "compute_120"})
    archs.append(arch);
#endif
  info["cuda_archs"] = archs;
  return info;
}

py::dict machine_info() {
  py::dict info;
  info["cpu_isa"] = isa_name(best_isa());
  info["amx_bf16"] = has_amx_bf16();
  info["threads"] = has_team() ? "OpenMP" : "own";
#if SURVFUSE_WITH_CUDA
  const CudaStatus status = cuda_status();
  info["cuda_runtime"] = status.runtime_version;
  info["cuda_driver"] = status.driver_version;
  info["cuda_devices"] = status.n_devices;
  info["cuda_error"] = status.error;
#endif
  return info;
}

bool cpu_isa_available(int isa) { return isa_available(static_cast<CpuIsa>(isa)); }

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The native core of survfuse: torch-free launchers over raw pointers.";
  m.def("build_info", &build_info, "What was built: compiler, CPU instruction sets, CUDA.");
  m.def("machine_info", &machine_info, "What this machine can run of it.");
  m.def("cpu_isa_available", &cpu_isa_available);
  m.def("pool_bag_workspace", &workspace);
  m.def("pool_bag_forward", &pool_bag_forward);
  m.def("pool_bag_backward", &pool_bag_backward);
  m.def("cross_attention_workspace", &attention_workspace);
  m.def("cross_attention_forward", &cross_attention_forward);
  m.def("cross_attention_backward", &cross_attention_backward);
  m.def("gated_attention_pool_workspace", &gated_workspace);
  m.def("gated_attention_pool_forward", &gated_attention_pool_forward);
  m.def("gated_attention_pool_backward", &gated_attention_pool_backward);
  bind_multi_scale_deformable_attention(m);
  bind_position_biased_attention(m);
}
