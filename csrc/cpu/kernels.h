// What each instruction set's copy of the kernels offers to the registrations.
#pragma once
#include <cstdint>

#include "../math.h"
#include "isa.h"

namespace flywheel {
enum class Float { kFp32, kBf16, kFp16 };
constexpr int64_t kGroup = 16;     // rows that are worked on together
constexpr int64_t kLaneClasses = 32; // up to so many classes a row is a lane; above, vectors run along the row
constexpr int64_t kFlush = 256;    // samples whose statistics are added in float32 before they join a float64 sum

static inline int64_t padded(int64_t c) { return (c + 15) / 16 * 16; }

// The operands of main_estep, aux_estep, em_step and posterior: one pass over either or both networks' logits.
struct EmStep {
  int64_t n, c;
  const int64_t* labels;                       // [N]
  const void* main_logits = nullptr;           // [N, C]; absent in aux_estep and posterior
  Prior prior = {};
  const float* main_eps = nullptr;             // [N]
  const void* aux_logits = nullptr;            // [N, C]; absent in main_estep
  const float* clean_in = nullptr;             // [N]; where the main network's logits are absent
  const float* corruption_t = nullptr;         // [C, width]: row observed label
  int64_t width = 0;                           // padded(C) with zeros after C where a row is a lane, else C
  const float* corruption = nullptr;           // [C, padded]: row true class; up to 32 classes only
  const float* align = nullptr;                // [padded], zeros after C
  bool joint = false;
  const int32_t* order = nullptr;              // [N] rows sorted by label, or absent: as they come
  float* clean_prob = nullptr;                 // outputs; absent where not asked for
  int64_t *resampled = nullptr, *suggested = nullptr;
  float *suggested_prob = nullptr, *eps = nullptr;
  float* q = nullptr;                          // [N, C]
};

// Statistics of one part of the rows. In float32 they belong to a label, at label * stride; `flush` moves them on.
struct EmPart {
  double clean = 0;                            // sum of clean_prob
  int64_t bad = -1;                            // a row whose label is no class
  float* e = nullptr;                          // [kGroup, padded]
  bool sums = false;                           // whether the following are wanted
  int64_t stride = 0;                          // padded, or 0: rows come sorted, and one label's row serves in turn
  float *r32 = nullptr, *q32 = nullptr;        // [C or 1, padded]
  float *own32 = nullptr;                      // [C]
  int32_t* count = nullptr;                    // [C]
  float* f32 = nullptr;                        // [padded], or [C, 16] where a row is a lane
  double *r = nullptr, *q = nullptr;           // [C, C], row observed label; without q it is r plus `own` on its diagonal
  double *own = nullptr, *f = nullptr;         // [C]
  int64_t edge_label[2] = {-1, -1};            // labels whose rows other parts have too ...
  double* edge = nullptr;                      // ... their sums [2, r and q, C] are added later, in order
};

struct PosteriorLoss {
  int64_t n, c, views;                         // N samples; row v * N + i of the logits belongs to sample i
  const void* logits;                          // [views * N, C]
  const EmStep* teacher;                       // nullptr: the target is the label
  const int64_t* labels;                       // [N]
  float confidence, delta, scale;              // scale: 1 / (views * N)
  void* gradient;                              // [views * N, C]
};

struct Kernels {
  void (*em_step)(Float type, const EmStep& step, EmPart& part, int64_t begin, int64_t end);
  // Sum of the losses of samples [begin, end); `rows` is [3, kGroup, padded]. -1 or a row with a bad label in `bad`.
  double (*posterior_loss)(Float type, const PosteriorLoss& loss, float* rows, int64_t begin, int64_t end, int64_t* bad);
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
