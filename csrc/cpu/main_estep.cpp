// main_estep on the CPU: blocks of rows in parallel; their sums are added in order, so any number of threads agrees.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "../check.h"
#include "kernels.h"

namespace flywheel {
namespace {
constexpr int64_t kBlockElements = 1 << 14;

Float float_type(ScalarType type) {
  return type == ScalarType::Float ? Float::kFp32 : type == ScalarType::BFloat16 ? Float::kBf16 : Float::kFp16;
}

std::tuple<Tensor, Tensor> main_estep(const Tensor& logits, const Tensor& labels, const Tensor& gamma, const Tensor& eps) {
  check_logits("main_estep", logits);
  check_per_sample("main_estep", "labels", labels, logits, ScalarType::Long);
  check_per_sample("main_estep", "eps", eps, logits, ScalarType::Float);
  check_scalar("main_estep", "gamma", gamma, logits, ScalarType::Double);
  const int64_t n = logits.size(0), c = logits.size(1);
  Tensor clean_prob = torch::stable::empty_like(eps), sum = torch::stable::empty_like(gamma);
  const auto* label = labels.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i)
    STD_TORCH_CHECK(label[i] >= 0 && label[i] < c, "main_estep: labels[", i, "] is ", label[i], ", outside 0..", c - 1);
  const auto type = float_type(logits.scalar_type());
  const void* x = logits.data_ptr();
  const Prior p = prior(*gamma.const_data_ptr<double>());
  const float* e = eps.const_data_ptr<float>();
  float* out = clean_prob.mutable_data_ptr<float>();

  const int64_t rows = kBlockElements / c / 16 * 16 > 0 ? kBlockElements / c / 16 * 16 : 16, blocks = (n + rows - 1) / rows;
  std::vector<double> partial(static_cast<size_t>(blocks));
  auto work = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t last = (b + 1) * rows < n ? (b + 1) * rows : n;
      partial[static_cast<size_t>(b)] = kernels().main_estep(type, x, label, p, e, out, c, b * rows, last);
    }
  };
  blocks > 1 ? torch::stable::parallel_for(0, blocks, 1, work) : work(0, blocks);
  double total = 0;
  for (double part : partial) total += part;
  *sum.mutable_data_ptr<double>() = total;
  return {clean_prob, sum};
}

STABLE_TORCH_LIBRARY_IMPL(flywheel_fast, CPU, m) { m.impl("main_estep", TORCH_BOX(&main_estep)); }
}  // namespace
}  // namespace flywheel
