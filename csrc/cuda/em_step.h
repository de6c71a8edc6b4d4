// Launchers of the expectation steps and of the loss: plain pointers in, no torch.
#pragma once
#include <cstdint>

namespace flywheel {
enum class CudaFloat { kFp32, kBf16, kFp16 };
constexpr int64_t kLaneClasses = 32;     // up to so many classes a thread takes a row, and rows come as they are
constexpr int64_t kWidestClasses = 8192; // a row's terms fit into shared memory

// One pass over either or both networks' logits; absent pointers are null.
struct EmOperands {
  int64_t n;
  int c;
  bool joint;
  const int64_t* labels;          // [N]
  const void* main_logits;        // [N, C]
  const double* gamma;            // []
  const float* main_eps;          // [N]
  float* clean_prob;              // [N] out
  const void* aux_logits;         // [N, C]
  const float* clean_in;          // [N] where the main network's logits are absent
  const float* corruption_t;      // [C, C] row observed label
  const float* align;             // [C], or ones where absent
  int64_t *resampled, *suggested; // [N] out, or absent together with the next two
  float *suggested_prob, *eps;    // [N] out
  float* q;                       // [N, C] out
  double *r_sum, *q_sum, *f_sum;  // [C, C] row observed label, the same, [C]: added to, or absent
  double* clean_sum;              // []: added to, or absent
  const int32_t* order;           // [N] rows sorted by label: where sums are wanted of more than 32 classes
  const int64_t* starts;          // [C + 1] where each label starts in it
};
// Doubles of workspace that em_step_cuda needs.
int64_t em_step_workspace(const EmOperands& a);
// `stream` is a cudaStream_t. Throws std::runtime_error when a launch fails.
void em_step_cuda(CudaFloat type, const EmOperands& a, double* workspace, void* stream);

struct LossOperands {
  int64_t n, views;               // row v * N + i of the logits belongs to sample i
  int c;
  bool joint;
  float confidence, delta;
  const void* logits;             // [views * N, C]
  const int64_t* labels;          // [N]
  const void* teacher_logits;     // [N, C], or absent: the target is the label
  const float* clean_prob;        // [N]
  const float* corruption_t;      // [C, C] row observed label
  void* gradient;                 // [views * N, C] out
  double* partial;                // [N] workspace
  float* loss;                    // [] out
};
void posterior_loss_cuda(CudaFloat type, const LossOperands& a, void* stream);
}  // namespace flywheel
