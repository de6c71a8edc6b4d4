// Every op's schema; what each computes stands in flywheel_fast/reference.py under the same name.
// by_label: rows sorted by label, and where each label starts; what the CUDA statistics of more than 32 classes need.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(flywheel_fast, m) {
  m.def("main_estep(Tensor logits, Tensor labels, Tensor gamma, Tensor eps) -> (Tensor, Tensor)");
  m.def(
      "aux_estep(Tensor logits, Tensor labels, Tensor clean_prob, Tensor corruption, Tensor align, bool joint, "
      "Tensor? order, Tensor? starts) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "em_step(Tensor main_logits, Tensor aux_logits, Tensor labels, Tensor gamma, Tensor eps, Tensor corruption, "
      "Tensor align, bool joint, Tensor? order, Tensor? starts) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("posterior(Tensor logits, Tensor labels, Tensor clean_prob, Tensor corruption, bool joint) -> Tensor");
  m.def(
      "posterior_loss(Tensor logits, Tensor labels, Tensor? teacher_logits, Tensor? clean_prob, Tensor? corruption, "
      "bool joint, float confidence, float delta) -> (Tensor, Tensor)");
}
