// Argument checks with one wording for CPU and CUDA.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

namespace flywheel {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return "another type";
  }
}

inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& logits, ScalarType wanted) {
  STD_TORCH_CHECK(t.scalar_type() == wanted, op, ": ", name, " must be ", name_of(wanted), ", not ", name_of(t.scalar_type()));
  STD_TORCH_CHECK(t.device() == logits.device(), op, ": ", name, " must be on the logits' device");
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
}

// logits [N, C] of a floating type that the kernels know, contiguous.
inline void check_logits(const char* op, const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, op, ": logits must have shape [N, C] with C > 0");
  STD_TORCH_CHECK(logits.size(1) < (int64_t(1) << 24), op, ": more than 16,777,215 classes");
  STD_TORCH_CHECK(logits.size(0) < (int64_t(1) << 31), op, ": more than 2,147,483,647 rows");
  const auto type = logits.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
                  ": logits must be float32, bfloat16 or float16, not ", name_of(type));
  STD_TORCH_CHECK(logits.is_contiguous(), op, ": logits must be contiguous");
}

// The other network's logits: of the same classes and type; `rows` as said.
inline void check_logits_pair(const char* op, const char* name, const Tensor& t, const Tensor& logits, int64_t rows) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == logits.size(1) && t.size(0) == rows, op, ": ", name, " must have shape [", rows, ", ",
                  logits.size(1), "]");
  check_like(op, name, t, logits, logits.scalar_type());
}

// One value a sample: [N].
inline void check_per_sample(const char* op, const char* name, const Tensor& t, const Tensor& logits, ScalarType wanted) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == logits.size(0), op, ": ", name, " must have shape [N] with N = ", logits.size(0));
  check_like(op, name, t, logits, wanted);
}

inline void check_scalar(const char* op, const char* name, const Tensor& t, const Tensor& logits, ScalarType wanted) {
  STD_TORCH_CHECK(t.dim() == 0, op, ": ", name, " must be a 0-dim tensor");
  check_like(op, name, t, logits, wanted);
}

inline void check_square(const char* op, const char* name, const Tensor& t, const Tensor& logits, ScalarType wanted) {
  const int64_t c = logits.size(1);
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == c && t.size(1) == c, op, ": ", name, " must have shape [C, C] with C = ", c);
  check_like(op, name, t, logits, wanted);
}
inline void check_corruption(const char* op, const Tensor& t, const Tensor& logits) { check_square(op, "corruption", t, logits, ScalarType::Float); }

inline void check_align(const char* op, const Tensor& t, const Tensor& logits) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == logits.size(1), op, ": align must have shape [C] with C = ", logits.size(1));
  check_like(op, "align", t, logits, ScalarType::Float);
}

inline void check_main(const char* op, const Tensor& logits, const Tensor& labels, const Tensor& gamma, const Tensor& eps,
                       const Tensor& clean_prob, const Tensor& clean_sum) {
  check_logits(op, logits);
  check_per_sample(op, "labels", labels, logits, ScalarType::Long);
  check_per_sample(op, "eps", eps, logits, ScalarType::Float);
  check_scalar(op, "gamma", gamma, logits, ScalarType::Double);
  check_per_sample(op, "clean_prob", clean_prob, logits, ScalarType::Float);
  check_scalar(op, "clean_sum", clean_sum, logits, ScalarType::Double);
}

inline void check_aux(const char* op, const Tensor& logits, const Tensor& labels, const Tensor& clean_prob, const Tensor& corruption,
                      const Tensor* align) {
  check_logits(op, logits);
  check_per_sample(op, "labels", labels, logits, ScalarType::Long);
  check_per_sample(op, "clean_prob", clean_prob, logits, ScalarType::Float);
  check_corruption(op, corruption, logits);
  if (align) check_align(op, *align, logits);
}

inline void check_em_step(const Tensor& main_logits, const Tensor& aux_logits, const Tensor& labels, const Tensor& gamma, const Tensor& eps,
                          const Tensor& corruption, const Tensor& align, const Tensor& clean_prob, const Tensor& clean_sum) {
  check_main("em_step", main_logits, labels, gamma, eps, clean_prob, clean_sum);
  check_logits_pair("em_step", "aux_logits", aux_logits, main_logits, main_logits.size(0));
  check_corruption("em_step", corruption, main_logits);
  check_align("em_step", align, main_logits);
}

// What aux_estep and em_step write.
inline void check_aux_out(const char* op, const Tensor& logits, const Tensor& resampled, const Tensor& suggested, const Tensor& suggested_prob,
                          const Tensor& eps, const Tensor& r, const Tensor& q, const Tensor& f) {
  check_per_sample(op, "resampled_label", resampled, logits, ScalarType::Long);
  check_per_sample(op, "suggested_label", suggested, logits, ScalarType::Long);
  check_per_sample(op, "suggested_prob", suggested_prob, logits, ScalarType::Float);
  check_per_sample(op, "eps", eps, logits, ScalarType::Float);
  check_square(op, "corrupted_sum", r, logits, ScalarType::Double);
  check_square(op, "posterior_sum", q, logits, ScalarType::Double);
  STD_TORCH_CHECK(f.dim() == 1 && f.size(0) == logits.size(1), op, ": class_sum must have shape [C] with C = ", logits.size(1));
  check_like(op, "class_sum", f, logits, ScalarType::Double);
}

// Returns N: logits are [views * N, C], everything else is of N samples. Without a teacher the labels are the target.
inline int64_t check_posterior_loss(const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& teacher,
                                    const std::optional<Tensor>& clean_prob, const std::optional<Tensor>& corruption) {
  const char* op = "posterior_loss";
  check_logits(op, logits);
  STD_TORCH_CHECK(labels.dim() == 1, op, ": labels must have shape [N]");
  check_like(op, "labels", labels, logits, ScalarType::Long);
  const int64_t n = labels.size(0);
  STD_TORCH_CHECK(n ? logits.size(0) % n == 0 && logits.size(0) > 0 : logits.size(0) == 0, op, ": logits must have a whole number of rows for each of ",
                  n, " labels, not ", logits.size(0));
  STD_TORCH_CHECK(teacher.has_value() == clean_prob.has_value() && teacher.has_value() == corruption.has_value(), op,
                  ": teacher_logits, clean_prob and corruption come together or not at all");
  if (!teacher) return n;
  check_logits_pair(op, "teacher_logits", *teacher, logits, n);
  check_per_sample(op, "clean_prob", *clean_prob, *teacher, ScalarType::Float);
  check_corruption(op, *corruption, logits);
  return n;
}
}  // namespace flywheel
