// Argument checks with one wording for CPU and CUDA.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace flywheel {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    default: return "another type";
  }
}

inline void check_type(const char* op, const char* name, const Tensor& t, ScalarType wanted) {
  STD_TORCH_CHECK(t.scalar_type() == wanted, op, ": ", name, " must be ", name_of(wanted), ", not ", name_of(t.scalar_type()));
}

// logits [N, C] of a floating type that the kernels know, contiguous.
inline void check_logits(const char* op, const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, op, ": logits must have shape [N, C] with C > 0");
  const auto type = logits.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
                  ": logits must be float32, bfloat16 or float16, not ", name_of(type));
  STD_TORCH_CHECK(logits.is_contiguous(), op, ": logits must be contiguous");
}

// One value a sample: [N], of the type wanted, on the logits' device, contiguous.
inline void check_per_sample(const char* op, const char* name, const Tensor& t, const Tensor& logits, ScalarType wanted) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == logits.size(0), op, ": ", name, " must have shape [N] with N = ", logits.size(0));
  check_type(op, name, t, wanted);
  STD_TORCH_CHECK(t.device() == logits.device(), op, ": ", name, " must be on the logits' device");
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
}

inline void check_scalar(const char* op, const char* name, const Tensor& t, const Tensor& logits, ScalarType wanted) {
  STD_TORCH_CHECK(t.dim() == 0, op, ": ", name, " must be a 0-dim tensor");
  check_type(op, name, t, wanted);
  STD_TORCH_CHECK(t.device() == logits.device(), op, ": ", name, " must be on the logits' device");
}
}  // namespace flywheel
