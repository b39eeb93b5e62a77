// What the files that bind launchers share. Pointers are integers; Python checks before it calls.
#pragma once

#include <pybind11/pybind11.h>

#include "pool_bag.h"

namespace survfuse {

// The arguments of a launcher, by the names of its parameter struct.
struct Fields {
  const pybind11::dict& fields;

  template <class T = void>
  T* address(const char* name) const {
    return reinterpret_cast<T*>(fields[name].cast<uintptr_t>());
  }
  int64_t integer(const char* name) const { return fields[name].cast<int64_t>(); }
  double real(const char* name) const { return fields[name].cast<double>(); }
  bool flag(const char* name) const { return fields[name].cast<bool>(); }
  uint64_t bits(const char* name) const { return fields[name].cast<uint64_t>(); }
  ElementType type(const char* name) const {
    return static_cast<ElementType>(fields[name].cast<int>());
  }
  CpuIsa isa() const { return static_cast<CpuIsa>(fields["isa"].cast<int>()); }
};

// each in csrc/<op>_bindings.cpp
void bind_multi_scale_deformable_attention(pybind11::module_& m);
void bind_position_biased_attention(pybind11::module_& m);

}  // namespace survfuse
