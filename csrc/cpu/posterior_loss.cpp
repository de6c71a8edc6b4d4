// posterior_loss on the CPU: blocks of samples in parallel, their losses added in order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "operands.h"

namespace flywheel {
namespace {
constexpr int64_t kBlockElements = 1 << 13;

std::tuple<Tensor, Tensor> posterior_loss(const Tensor& logits, const Tensor& labels, std::optional<Tensor> teacher,
                                          std::optional<Tensor> clean_prob, std::optional<Tensor> corruption_t, bool joint,
                                          double confidence, double delta) {
  const int64_t n = check_posterior_loss(logits, labels, teacher, clean_prob, corruption_t), c = logits.size(1);
  EmStep s = {n, c, labels.const_data_ptr<int64_t>()};
  std::optional<AuxTables> tables;
  if (teacher) {
    s.clean_in = clean_prob->const_data_ptr<float>();
    tables.emplace(s, *teacher, *corruption_t, nullptr, joint);
  }
  Tensor gradient = torch::stable::empty_like(logits), mean = torch::stable::new_empty(logits, {}, ScalarType::Float);
  const int64_t views = n ? logits.size(0) / n : 1;
  const PosteriorLoss loss = {n, c, views, logits.data_ptr(), teacher ? &s : nullptr, s.labels, float(confidence), float(delta),
                              n ? 1.f / float(views * n) : 0.f, gradient.data_ptr()};
  const int64_t rows = (kBlockElements / c + kGroup - 1) / kGroup * kGroup + (kBlockElements < c ? kGroup : 0);
  const int64_t blocks = (n + rows - 1) / rows;
  std::vector<double> sums(static_cast<size_t>(blocks));
  std::vector<int64_t> bad(static_cast<size_t>(blocks), -1);
  in_parallel(blocks, [&](int64_t b) {
    const std::unique_ptr<float[]> scratch(new float[size_t(3 * kGroup * padded(c))]);
    sums[size_t(b)] = kernels().posterior_loss(float_type(logits), loss, scratch.get(), b * rows, std::min((b + 1) * rows, n), &bad[size_t(b)]);
  });
  for (int64_t row : bad)
    if (row >= 0) check_label("posterior_loss", s.labels, row, c);
  double total = 0;
  for (double sum : sums) total += sum;
  *mean.mutable_data_ptr<float>() = float(total / double(views * n));  // NaN of no samples, as torch's mean
  return {mean, gradient};
}

STABLE_TORCH_LIBRARY_IMPL(flywheel_fast, CPU, m) { m.impl("posterior_loss", TORCH_BOX(&posterior_loss)); }
}  // namespace
}  // namespace flywheel
