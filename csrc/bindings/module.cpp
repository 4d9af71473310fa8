// pybind11 rather than torch ops for what has identity and no tensors: a torch op cannot carry such an object.
#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_assign(py::module_& m);
void bind_hw(py::module_& m);
void bind_runtime(py::module_& m);
void bind_pe(py::module_& m);
void bind_storage(py::module_& m);

PYBIND11_MODULE(_C, m) {
  m.doc() = "mixbit objects without tensors: bit allocation, hardware models, stored codes, integer runtime.";
  bind_assign(m);
  bind_hw(m);
  bind_runtime(m);
  bind_pe(m);
  bind_storage(m);
}
