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

// The corruption matrix and the alignment weights, padded to whole vectors.
struct AuxTables {
  std::unique_ptr<float[]> floats;
  AuxTables(EmStep& s, const Tensor& logits, const Tensor& corruption, const Tensor* align, bool joint) {
    const int64_t p = padded(s.c);
    const bool both = s.c <= 32;
    floats.reset(new float[size_t(s.c * p * (both ? 2 : 1) + p)]);
    float *t = floats.get(), *a = t + s.c * p, *plain = a + p;
    const float* from = corruption.const_data_ptr<float>();
    in_parallel((s.c + 15) / 16, [&](int64_t b) { kernels().transpose(from, s.c, t, 16 * b, std::min(16 * b + 16, s.c)); });
    std::fill_n(a, p, align ? 0.f : 1.f);
    if (align) std::copy_n(align->const_data_ptr<float>(), s.c, a);
    for (int64_t k = 0; both && k < s.c; ++k) {
      std::copy_n(from + k * s.c, s.c, plain + k * p);
      std::fill_n(plain + k * p + s.c, p - s.c, 0.f);
    }
    s.aux_logits = logits.data_ptr();
    s.corruption_t = t;
    s.corruption = both ? plain : nullptr;
    s.align = a;
    s.joint = joint;
  }
};
}  // namespace flywheel
