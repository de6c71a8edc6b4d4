// main_estep on CUDA: tensors in and out, on the current stream of the logits' device, without a synchronisation.
#include "main_estep.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../check.h"

namespace flywheel {
namespace {
CudaFloat float_type(ScalarType type) {
  return type == ScalarType::Float ? CudaFloat::kFp32 : type == ScalarType::BFloat16 ? CudaFloat::kBf16 : CudaFloat::kFp16;
}

std::tuple<Tensor, Tensor> main_estep(const Tensor& logits, const Tensor& labels, const Tensor& gamma, const Tensor& eps) {
  check_logits("main_estep", logits);
  check_per_sample("main_estep", "labels", labels, logits, ScalarType::Long);
  check_per_sample("main_estep", "eps", eps, logits, ScalarType::Float);
  check_scalar("main_estep", "gamma", gamma, logits, ScalarType::Double);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const int64_t n = logits.size(0), c = logits.size(1);
  Tensor clean_prob = torch::stable::empty_like(eps), sum = torch::stable::new_zeros(gamma, {});
  if (n == 0) return {clean_prob, sum};
  Tensor partial = torch::stable::new_empty(gamma, {main_estep_blocks(n, c)});
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(logits.get_device_index(), &stream));
  main_estep_cuda(float_type(logits.scalar_type()), logits.data_ptr(), labels.const_data_ptr<int64_t>(),
                  gamma.const_data_ptr<double>(), eps.const_data_ptr<float>(), clean_prob.mutable_data_ptr<float>(),
                  partial.mutable_data_ptr<double>(), sum.mutable_data_ptr<double>(), n, c, stream);
  return {clean_prob, sum};
}

STABLE_TORCH_LIBRARY_IMPL(flywheel_fast, CUDA, m) { m.impl("main_estep", TORCH_BOX(&main_estep)); }
}  // namespace
}  // namespace flywheel
