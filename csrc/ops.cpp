// Every op's schema; what each computes stands in flywheel_fast/reference.py under the same name.
// corruption_t: row observed label. order, starts: rows sorted by label, and where each label starts; what the CUDA
// statistics of more than 32 classes need. The tensors that are written to: per sample overwritten, sums added to.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(flywheel_fast, m) {
  m.def(
      "main_estep(Tensor logits, Tensor labels, Tensor gamma, Tensor eps, Tensor(a!) clean_prob, Tensor(b!) clean_sum) -> ()");
  m.def(
      "aux_estep(Tensor logits, Tensor labels, Tensor clean_prob, Tensor corruption_t, Tensor align, bool joint, "
      "Tensor? order, Tensor? starts, Tensor(a!) resampled, Tensor(b!) suggested, Tensor(c!) suggested_prob, "
      "Tensor(d!) eps, Tensor(e!) corrupted_sum, Tensor(f!) posterior_sum, Tensor(g!) class_sum) -> ()");
  m.def(
      "em_step(Tensor main_logits, Tensor aux_logits, Tensor labels, Tensor gamma, Tensor eps, Tensor corruption_t, "
      "Tensor align, bool joint, Tensor? order, Tensor? starts, Tensor(a!) clean_prob, Tensor(b!) clean_sum, "
      "Tensor(c!) resampled, Tensor(d!) suggested, Tensor(e!) suggested_prob, Tensor(f!) new_eps, "
      "Tensor(g!) corrupted_sum, Tensor(h!) posterior_sum, Tensor(i!) class_sum) -> ()");
  m.def("posterior(Tensor logits, Tensor labels, Tensor clean_prob, Tensor corruption_t, bool joint) -> Tensor");
  m.def(
      "posterior_loss(Tensor logits, Tensor labels, Tensor? teacher_logits, Tensor? clean_prob, Tensor? corruption_t, "
      "bool joint, float confidence, float delta) -> (Tensor, Tensor)");
}
