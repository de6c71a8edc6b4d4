// The table of one instruction set. Included with FLYWHEEL_TABLE set to its name, after the target pragma.
#include "em_step.h"
#include "posterior_loss.h"

namespace flywheel {
const Kernels FLYWHEEL_TABLE = {
    [](Float type, const EmStep& step, EmPart& part, int64_t begin, int64_t end) {
      switch (type) {
        case Float::kFp32: return em_step_rows<float>(step, part, begin, end);
        case Float::kBf16: return em_step_rows<bf16>(step, part, begin, end);
        default: return em_step_rows<fp16>(step, part, begin, end);
      }
    },
    [](Float type, const PosteriorLoss& loss, float* rows, int64_t begin, int64_t end, int64_t* bad) {
      switch (type) {
        case Float::kFp32: return posterior_loss_rows<float>(loss, rows, begin, end, bad);
        case Float::kBf16: return posterior_loss_rows<bf16>(loss, rows, begin, end, bad);
        default: return posterior_loss_rows<fp16>(loss, rows, begin, end, bad);
      }
    },
};
}  // namespace flywheel
