// The ops on CUDA: tensors in and out, on the current stream of the logits' device, without a synchronisation.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "../check.h"
#include "em_step.h"

namespace flywheel {
namespace {
CudaFloat float_type(const Tensor& logits) {
  const auto type = logits.scalar_type();
  return type == ScalarType::Float ? CudaFloat::kFp32 : type == ScalarType::BFloat16 ? CudaFloat::kBf16 : CudaFloat::kFp16;
}
void* stream_of(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}
void check_classes(const char* op, const Tensor& logits) {
  STD_TORCH_CHECK(logits.size(1) <= kWidestClasses, op, ": at most ", kWidestClasses, " classes on CUDA, not ", logits.size(1));
}

EmOperands operands(const Tensor& logits, const Tensor& labels) {
  EmOperands a = {};
  a.n = logits.size(0);
  a.c = int(logits.size(1));
  a.labels = labels.const_data_ptr<int64_t>();
  return a;
}
void with_main(EmOperands& a, const Tensor& logits, const Tensor& gamma, const Tensor& eps, Tensor& clean_prob, Tensor& sum) {
  a.main_logits = logits.data_ptr();
  a.gamma = gamma.const_data_ptr<double>();
  a.main_eps = eps.const_data_ptr<float>();
  a.clean_prob = clean_prob.mutable_data_ptr<float>();
  a.clean_sum = sum.mutable_data_ptr<double>();
}
void with_order(const char* op, EmOperands& a, const Tensor& logits, const std::optional<Tensor>& order, const std::optional<Tensor>& starts) {
  if (a.c <= kLaneClasses) return;
  STD_TORCH_CHECK(order && starts, op, ": more than ", kLaneClasses, " classes need order [N] and starts [C + 1]");
  check_per_sample(op, "order", *order, logits, ScalarType::Int);
  check_like(op, "starts", *starts, logits, ScalarType::Long);
  STD_TORCH_CHECK(starts->dim() == 1 && starts->size(0) == a.c + 1, op, ": starts must have shape [C + 1] with C = ", a.c);
  a.order = order->const_data_ptr<int32_t>();
  a.starts = starts->const_data_ptr<int64_t>();
}
void run(const EmOperands& a, const Tensor& logits) {
  if (a.n == 0) return;
  Tensor workspace = torch::stable::new_empty(logits, {em_step_workspace(a)}, ScalarType::Double);
  em_step_cuda(float_type(logits), a, workspace.mutable_data_ptr<double>(), stream_of(logits));
}

void with_aux(EmOperands& a, const Tensor& logits, const Tensor& corruption_t, bool joint) {
  a.joint = joint;
  a.aux_logits = logits.data_ptr();
  a.corruption_t = corruption_t.const_data_ptr<float>();
}

// The outputs of the auxiliary step: per sample they are overwritten, the sums are added to.
struct AuxOut {
  Tensor resampled, suggested, suggested_prob, eps, r, q, f;
  void into(const char* op, EmOperands& a, const Tensor& logits, const Tensor& align) {
    check_aux_out(op, logits, resampled, suggested, suggested_prob, eps, r, q, f);
    a.align = align.const_data_ptr<float>();
    a.resampled = resampled.mutable_data_ptr<int64_t>();
    a.suggested = suggested.mutable_data_ptr<int64_t>();
    a.suggested_prob = suggested_prob.mutable_data_ptr<float>();
    a.eps = eps.mutable_data_ptr<float>();
    a.r_sum = r.mutable_data_ptr<double>();
    a.q_sum = q.mutable_data_ptr<double>();
    a.f_sum = f.mutable_data_ptr<double>();
  }
};

void main_estep(const Tensor& logits, const Tensor& labels, const Tensor& gamma, const Tensor& eps, Tensor clean_prob, Tensor clean_sum) {
  check_main("main_estep", logits, labels, gamma, eps, clean_prob, clean_sum);
  check_classes("main_estep", logits);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  EmOperands a = operands(logits, labels);
  with_main(a, logits, gamma, eps, clean_prob, clean_sum);
  run(a, logits);
}

void aux_estep(const Tensor& logits, const Tensor& labels, const Tensor& clean_prob, const Tensor& corruption_t, const Tensor& align, bool joint,
               std::optional<Tensor> order, std::optional<Tensor> starts, Tensor resampled, Tensor suggested, Tensor suggested_prob, Tensor eps,
               Tensor r, Tensor q, Tensor f) {
  check_aux("aux_estep", logits, labels, clean_prob, corruption_t, &align);
  check_classes("aux_estep", logits);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  EmOperands a = operands(logits, labels);
  with_order("aux_estep", a, logits, order, starts);
  with_aux(a, logits, corruption_t, joint);
  a.clean_in = clean_prob.const_data_ptr<float>();
  AuxOut{resampled, suggested, suggested_prob, eps, r, q, f}.into("aux_estep", a, logits, align);
  run(a, logits);
}

void em_step(const Tensor& main_logits, const Tensor& aux_logits, const Tensor& labels, const Tensor& gamma, const Tensor& eps,
             const Tensor& corruption_t, const Tensor& align, bool joint, std::optional<Tensor> order, std::optional<Tensor> starts,
             Tensor clean_prob, Tensor clean_sum, Tensor resampled, Tensor suggested, Tensor suggested_prob, Tensor new_eps, Tensor r, Tensor q,
             Tensor f) {
  check_em_step(main_logits, aux_logits, labels, gamma, eps, corruption_t, align, clean_prob, clean_sum);
  check_classes("em_step", main_logits);
  const torch::stable::accelerator::DeviceGuard guard(main_logits.get_device_index());
  EmOperands a = operands(main_logits, labels);
  with_main(a, main_logits, gamma, eps, clean_prob, clean_sum);
  with_order("em_step", a, main_logits, order, starts);
  with_aux(a, aux_logits, corruption_t, joint);
  AuxOut{resampled, suggested, suggested_prob, new_eps, r, q, f}.into("em_step", a, main_logits, align);
  run(a, main_logits);
}

Tensor posterior_q(const Tensor& logits, const Tensor& labels, const Tensor& clean_prob, const Tensor& corruption_t, bool joint) {
  check_aux("posterior", logits, labels, clean_prob, corruption_t, nullptr);
  check_classes("posterior", logits);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  EmOperands a = operands(logits, labels);
  with_aux(a, logits, corruption_t, joint);
  Tensor q = torch::stable::new_empty(clean_prob, {a.n, a.c});
  a.clean_in = clean_prob.const_data_ptr<float>();
  a.q = q.mutable_data_ptr<float>();
  run(a, logits);
  return q;
}

std::tuple<Tensor, Tensor> posterior_loss(const Tensor& logits, const Tensor& labels, std::optional<Tensor> teacher,
                                          std::optional<Tensor> clean_prob, std::optional<Tensor> corruption_t, bool joint,
                                          double confidence, double delta) {
  LossOperands a = {};
  a.n = check_posterior_loss(logits, labels, teacher, clean_prob, corruption_t);
  STD_TORCH_CHECK(logits.size(1) <= kWidestClasses / 2, "posterior_loss: at most ", kWidestClasses / 2, " classes on CUDA, not ", logits.size(1));
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Tensor gradient = torch::stable::empty_like(logits), loss = torch::stable::new_empty(logits, {}, ScalarType::Float);
  Tensor partial = torch::stable::new_empty(logits, {a.n}, ScalarType::Double);
  a.c = int(logits.size(1));
  a.views = a.n ? logits.size(0) / a.n : 1;
  a.joint = joint;
  a.confidence = float(confidence);
  a.delta = float(delta);
  a.logits = logits.data_ptr();
  a.labels = labels.const_data_ptr<int64_t>();
  if (teacher) {
    a.teacher_logits = teacher->data_ptr();
    a.clean_prob = clean_prob->const_data_ptr<float>();
    a.corruption_t = corruption_t->const_data_ptr<float>();
  }
  a.gradient = gradient.data_ptr();
  a.partial = partial.mutable_data_ptr<double>();
  a.loss = loss.mutable_data_ptr<float>();
  posterior_loss_cuda(float_type(logits), a, stream_of(logits));
  return {loss, gradient};
}

STABLE_TORCH_LIBRARY_IMPL(flywheel_fast, CUDA, m) {
  m.impl("main_estep", TORCH_BOX(&main_estep));
  m.impl("aux_estep", TORCH_BOX(&aux_estep));
  m.impl("em_step", TORCH_BOX(&em_step));
  m.impl("posterior", TORCH_BOX(&posterior_q));
  m.impl("posterior_loss", TORCH_BOX(&posterior_loss));
}
}  // namespace
}  // namespace flywheel
