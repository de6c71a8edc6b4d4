// What each instruction set's copy of the kernels offers to the registrations.
#pragma once
#include <cstdint>

#include "../math.h"
#include "isa.h"

namespace flywheel {
enum class Float { kFp32, kBf16, kFp16 };

struct Kernels {
  // Rows [begin, end) of the main E-step; the sum of their clean_prob.
  double (*main_estep)(Float type, const void* logits, const int64_t* labels, Prior prior, const float* eps, float* clean_prob,
                       int64_t num_classes, int64_t begin, int64_t end);
};
extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

inline const Kernels& kernels() {
  switch (isa()) {
    case Isa::kAvx512: return kernels_avx512;
    case Isa::kAvx2: return kernels_avx2;
    default: return kernels_baseline;
  }
}
}  // namespace flywheel
