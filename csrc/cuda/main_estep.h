// Launcher of the main E-step: plain pointers in, no torch.
#pragma once
#include <cstdint>

namespace flywheel {
enum class CudaFloat { kFp32, kBf16, kFp16 };

// Blocks that main_estep_cuda uses for [n, c] logits: `partial` needs as many doubles.
int64_t main_estep_blocks(int64_t n, int64_t c);

// clean_prob [n] and its sum []; `stream` is a cudaStream_t. Throws std::runtime_error when a launch fails.
void main_estep_cuda(CudaFloat type, const void* logits, const int64_t* labels, const double* gamma, const float* eps,
                     float* clean_prob, double* partial, double* sum, int64_t n, int64_t c, void* stream);
}  // namespace flywheel
