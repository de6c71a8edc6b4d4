// Every op's schema; what each computes stands in flywheel_fast/reference.py under the same name.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(flywheel_fast, m) {
  m.def("main_estep(Tensor logits, Tensor labels, Tensor gamma, Tensor eps) -> (Tensor, Tensor)");
}
