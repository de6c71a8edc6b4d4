// From tensors to the kernels' operands; shared by the registrations on the CPU.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>

#include "../check.h"
#include "kernels.h"

namespace flywheel {
inline Float float_type(const Tensor& logits) {
  const auto type = logits.scalar_type();
  return type == ScalarType::Float ? Float::kFp32 : type == ScalarType::BFloat16 ? Float::kBf16 : Float::kFp16;
}

inline void check_label(const char* op, const int64_t* labels, int64_t i, int64_t c) {
  STD_TORCH_CHECK(labels[i] >= 0 && labels[i] < c, op, ": labels[", i, "] is ", labels[i], ", outside 0..", c - 1);
}

template <class F>
void in_parallel(int64_t count, const F& work) {
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) work(b);
  };
  count > 1 ? torch::stable::parallel_for(0, count, 1, range) : range(0, count);
}

inline void with_main(EmStep& s, const Tensor& logits, const Tensor& gamma, const Tensor& eps, Tensor& clean_prob) {
  s.main_logits = logits.data_ptr();
  s.prior = prior(*gamma.const_data_ptr<double>());
  s.main_eps = eps.const_data_ptr<float>();
  s.clean_prob = clean_prob.mutable_data_ptr<float>();
}

// The tables of the auxiliary step as the kernels want them.
struct AuxTables {
  std::unique_ptr<float[]> floats;
  AuxTables(EmStep& s, const Tensor& logits, const Tensor& corruption_t, const Tensor* align, bool joint) {
    const int64_t p = padded(s.c);
    const bool lanes = s.c <= kLaneClasses;
    floats.reset(new float[size_t(lanes ? p + 2 * s.c * p : p)]());
    float *a = floats.get(), *by_label = a + p, *by_class = by_label + s.c * p;
    const float* t = corruption_t.const_data_ptr<float>();
    for (int64_t k = 0; k < s.c; ++k) a[k] = align ? align->const_data_ptr<float>()[k] : 1.f;
    for (int64_t k = 0; lanes && k < s.c; ++k)
      for (int64_t j = 0; j < s.c; ++j) by_class[k * p + j] = by_label[j * p + k] = t[j * s.c + k];
    s.aux_logits = logits.data_ptr();
    s.corruption_t = lanes ? by_label : t;
    s.width = lanes ? p : s.c;
    s.corruption = lanes ? by_class : nullptr;
    s.align = a;
    s.joint = joint;
  }
};
}  // namespace flywheel
