// The Python module: says how it was built. Ops are reached through torch.ops.flywheel_fast, never from here.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"

#define FLYWHEEL_TEXT_(x) #x
#define FLYWHEEL_TEXT(x) FLYWHEEL_TEXT_(x)

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] {
    pybind11::dict info;
#ifdef FLYWHEEL_CUDA
    info["cuda"] = FLYWHEEL_TEXT(FLYWHEEL_CUDA);
#else
    info["cuda"] = pybind11::none();
#endif
    info["compiler"] = __VERSION__;
    info["cpu_kernels"] = flywheel::isa_name(flywheel::isa());
    return info;
  });
}
