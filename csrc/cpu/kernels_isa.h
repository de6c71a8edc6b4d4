// The table of one instruction set. Included with FLYWHEEL_TABLE set to its name, after the target pragma.
#include "main_estep.h"

namespace flywheel {
const Kernels FLYWHEEL_TABLE = {
    [](Float type, const void* logits, const int64_t* labels, Prior prior, const float* eps, float* clean_prob,
       int64_t num_classes, int64_t begin, int64_t end) {
      const MainEStep a{logits, labels, prior, eps, clean_prob, num_classes};
      switch (type) {
        case Float::kFp32: return main_estep_rows<float>(a, begin, end);
        case Float::kBf16: return main_estep_rows<bf16>(a, begin, end);
        default: return main_estep_rows<fp16>(a, begin, end);
      }
    },
};
}  // namespace flywheel
