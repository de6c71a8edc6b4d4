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
Tensor transposed(const Tensor& corruption) { return torch::stable::contiguous(torch::stable::transpose(corruption, 0, 1)); }

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

struct AuxOut {
  Tensor resampled, suggested, suggested_prob, eps, r, q, f;
  AuxOut(EmOperands& a, const Tensor& labels, const Tensor& per_sample, const Tensor& align)
      : resampled(torch::stable::empty_like(labels)),
        suggested(torch::stable::empty_like(labels)),
        suggested_prob(torch::stable::empty_like(per_sample)),
        eps(torch::stable::empty_like(per_sample)),
        r(torch::stable::new_zeros(per_sample, {a.c, a.c}, ScalarType::Double)),
        q(torch::stable::new_zeros(per_sample, {a.c, a.c}, ScalarType::Double)),
        f(torch::stable::new_zeros(per_sample, {a.c}, ScalarType::Double)) {
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

std::tuple<Tensor, Tensor> main_estep(const Tensor& logits, const Tensor& labels, const Tensor& gamma, const Tensor& eps) {
  check_main("main_estep", logits, labels, gamma, eps);
  check_classes("main_estep", logits);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Tensor clean_prob = torch::stable::empty_like(eps), sum = torch::stable::new_zeros(gamma, {});
  EmOperands a = operands(logits, labels);
  with_main(a, logits, gamma, eps, clean_prob, sum);
  run(a, logits);
  return {clean_prob, sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> aux_estep(
    const Tensor& logits, const Tensor& labels, const Tensor& clean_prob, const Tensor& corruption, const Tensor& align, bool joint,
    std::optional<Tensor> order, std::optional<Tensor> starts) {
  check_aux("aux_estep", logits, labels, clean_prob, corruption, &align);
  check_classes("aux_estep", logits);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  EmOperands a = operands(logits, labels);
  with_order("aux_estep", a, logits, order, starts);
  const Tensor t = transposed(corruption);
  a.joint = joint;
  a.aux_logits = logits.data_ptr();
  a.clean_in = clean_prob.const_data_ptr<float>();
  a.corruption_t = t.const_data_ptr<float>();
  AuxOut out(a, labels, clean_prob, align);
  run(a, logits);
  return {out.resampled, out.suggested, out.suggested_prob, out.eps, out.r, out.q, out.f};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> em_step(
    const Tensor& main_logits, const Tensor& aux_logits, const Tensor& labels, const Tensor& gamma, const Tensor& eps,
    const Tensor& corruption, const Tensor& align, bool joint, std::optional<Tensor> order, std::optional<Tensor> starts) {
  check_main("em_step", main_logits, labels, gamma, eps);
  check_logits_pair("em_step", "aux_logits", aux_logits, main_logits, main_logits.size(0));
  check_corruption("em_step", corruption, main_logits);
  check_align("em_step", align, main_logits);
  check_classes("em_step", main_logits);
  const torch::stable::accelerator::DeviceGuard guard(main_logits.get_device_index());
  Tensor clean_prob = torch::stable::empty_like(eps), sum = torch::stable::new_zeros(gamma, {});
  EmOperands a = operands(main_logits, labels);
  with_main(a, main_logits, gamma, eps, clean_prob, sum);
  with_order("em_step", a, main_logits, order, starts);
  const Tensor t = transposed(corruption);
  a.joint = joint;
  a.aux_logits = aux_logits.data_ptr();
  a.corruption_t = t.const_data_ptr<float>();
  AuxOut out(a, labels, eps, align);
  run(a, main_logits);
  return {clean_prob, sum, out.resampled, out.suggested, out.suggested_prob, out.eps, out.r, out.q, out.f};
}

Tensor posterior_q(const Tensor& logits, const Tensor& labels, const Tensor& clean_prob, const Tensor& corruption, bool joint) {
  check_aux("posterior", logits, labels, clean_prob, corruption, nullptr);
  check_classes("posterior", logits);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  EmOperands a = operands(logits, labels);
  const Tensor t = transposed(corruption);
  Tensor q = torch::stable::new_empty(clean_prob, {a.n, a.c});
  a.joint = joint;
  a.aux_logits = logits.data_ptr();
  a.clean_in = clean_prob.const_data_ptr<float>();
  a.corruption_t = t.const_data_ptr<float>();
  a.q = q.mutable_data_ptr<float>();
  run(a, logits);
  return q;
}

std::tuple<Tensor, Tensor> posterior_loss(const Tensor& logits, const Tensor& labels, std::optional<Tensor> teacher,
                                          std::optional<Tensor> clean_prob, std::optional<Tensor> corruption, bool joint,
                                          double confidence, double delta) {
  LossOperands a = {};
  a.n = check_posterior_loss(logits, labels, teacher, clean_prob, corruption);
  STD_TORCH_CHECK(logits.size(1) <= kWidestClasses / 2, "posterior_loss: at most ", kWidestClasses / 2, " classes on CUDA, not ", logits.size(1));
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Tensor gradient = torch::stable::empty_like(logits), loss = torch::stable::new_empty(logits, {}, ScalarType::Float);
  Tensor partial = torch::stable::new_empty(logits, {a.n}, ScalarType::Double);
  std::optional<Tensor> t;
  a.c = int(logits.size(1));
  a.views = a.n ? logits.size(0) / a.n : 1;
  a.joint = joint;
  a.confidence = float(confidence);
  a.delta = float(delta);
  a.logits = logits.data_ptr();
  a.labels = labels.const_data_ptr<int64_t>();
  if (teacher) {
    t = transposed(*corruption);
    a.teacher_logits = teacher->data_ptr();
    a.clean_prob = clean_prob->const_data_ptr<float>();
    a.corruption_t = t->const_data_ptr<float>();
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
