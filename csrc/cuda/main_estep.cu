// The main E-step, three layouts by the number of classes. Each reads the logits once and takes one exp an element.
#include "../math.h"
#include "main_estep.h"
#include "simt.cuh"

namespace flywheel {
namespace {
constexpr int kThreads = 128;       // of every kernel here
constexpr int kThreadPerRow = 32;   // up to so many classes
constexpr int kWarpPerRow = 2048;   // up to so many classes

// Adds the block's clean_prob in a fixed order: deterministic, and float64 across rows.
__device__ __forceinline__ void add_up(double mine, double* partial) {
  FLYWHEEL_SHARED(double, warps, kThreads / kWarp);
  mine = warp_sum(mine);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0;
    for (int w = 0; w < kThreads / kWarp; ++w) total += warps[w];
    partial[blockIdx.x] = total;
  }
}

// C <= 32: the block's rows are one contiguous range, copied together 16 bytes a thread into shared memory; then a
// thread a row, with an odd stride so that the banks differ.
template <class T>
__global__ void __launch_bounds__(kThreads)
    thread_per_row(const T* __restrict__ logits, const int64_t* __restrict__ labels, const double* __restrict__ gamma,
                   const float* __restrict__ eps, float* __restrict__ out, double* __restrict__ partial, int64_t n, int c) {
  FLYWHEEL_DYNAMIC_SHARED(float, tile);
  constexpr int kVector = 16 / sizeof(T);
  const int64_t first = int64_t(blockIdx.x) * kThreads;
  const int rows = int(n - first < kThreads ? n - first : kThreads);
  const int total = rows * c, stride = c | 1;
  const T* x = logits + first * c;
  // Elements before the first 16-byte boundary: at most kVector - 1, none where the tensor starts on one.
  const int ahead = int((16 - reinterpret_cast<uintptr_t>(x) % 16) % 16 / sizeof(T));
  const int head = ahead < total ? ahead : total;
  const int body = (total - head) / kVector * kVector;
  for (int k = threadIdx.x; k < head; k += kThreads) tile[k / c * stride + k % c] = to_float(x[k]);
  for (int k = head + int(threadIdx.x) * kVector; k < head + body; k += kThreads * kVector) {
    const uint4 raw = *reinterpret_cast<const uint4*>(x + k);
    const T* value = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int j = 0; j < kVector; ++j) tile[(k + j) / c * stride + (k + j) % c] = to_float(value[j]);
  }
  for (int k = head + body + int(threadIdx.x); k < total; k += kThreads) tile[k / c * stride + k % c] = to_float(x[k]);
  __syncthreads();

  double mine = 0;
  if (int(threadIdx.x) < rows) {
    const float* row = tile + int(threadIdx.x) * stride;
    const int64_t i = first + threadIdx.x;
    const int label = int(labels[i]);
    float top = row[0];
    for (int k = 1; k < c; ++k) top = fmaxf(top, row[k]);
    float sum = 0, of_label = 0;
    for (int k = 0; k < c; ++k) {
      const float e = __expf(row[k] - top);
      sum += e;
      if (k == label) of_label = e;
    }
    const float w = clean_prob(of_label, sum, prior(*gamma), eps[i]);
    out[i] = w;
    mine = w;
  }
  add_up(mine, partial);
}

// 32 < C <= 2048: a warp a row, the row in registers, all loads before the first use.
template <class T, int kValues>
__global__ void __launch_bounds__(kThreads)
    warp_per_row(const T* __restrict__ logits, const int64_t* __restrict__ labels, const double* __restrict__ gamma,
                 const float* __restrict__ eps, float* __restrict__ out, double* __restrict__ partial, int64_t n, int c) {
  constexpr int kVector = 16 / sizeof(T);
  const int lane = threadIdx.x % kWarp;
  const int64_t i = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  double mine = 0;
  if (i < n) {  // whole warps only
    const T* x = logits + i * c;
    const int label = int(labels[i]);
    float value[kValues];
    if (c % kVector == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0) {
#pragma unroll
      for (int v = 0; v < kValues / kVector; ++v) {
        const int at = (v * kWarp + lane) * kVector;
        uint4 raw = {};
        if (at < c) raw = *reinterpret_cast<const uint4*>(x + at);
        const T* part = reinterpret_cast<const T*>(&raw);
#pragma unroll
        for (int j = 0; j < kVector; ++j) value[v * kVector + j] = at < c ? to_float(part[j]) : -INFINITY;
      }
    } else {
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        const int at = v * kWarp + lane;
        value[v] = at < c ? to_float(x[at]) : -INFINITY;
      }
    }
    float top = value[0];
#pragma unroll
    for (int v = 1; v < kValues; ++v) top = fmaxf(top, value[v]);
    top = warp_max(top);
    float sum = 0;
#pragma unroll
    for (int v = 0; v < kValues; ++v) sum += __expf(value[v] - top);
    sum = warp_sum(sum);
    if (lane == 0) {
      const float w = clean_prob(__expf(to_float(x[label]) - top), sum, prior(*gamma), eps[i]);
      out[i] = w;
      mine = w;
    }
  }
  add_up(mine, partial);
}

// C > 2048: a block a row, in two passes; the second finds the row in the cache.
template <class T>
__global__ void __launch_bounds__(kThreads)
    block_per_row(const T* __restrict__ logits, const int64_t* __restrict__ labels, const double* __restrict__ gamma,
                  const float* __restrict__ eps, float* __restrict__ out, double* __restrict__ partial, int64_t n, int64_t c) {
  FLYWHEEL_SHARED(float, tops, kThreads / kWarp);
  FLYWHEEL_SHARED(float, sums, kThreads / kWarp);
  const int64_t i = blockIdx.x;
  const T* x = logits + i * c;
  float top = -INFINITY;
  for (int64_t k = threadIdx.x; k < c; k += kThreads) top = fmaxf(top, to_float(x[k]));
  top = warp_max(top);
  if (threadIdx.x % kWarp == 0) tops[threadIdx.x / kWarp] = top;
  __syncthreads();
  for (int w = 0; w < kThreads / kWarp; ++w) top = fmaxf(top, tops[w]);
  float sum = 0;
  for (int64_t k = threadIdx.x; k < c; k += kThreads) sum += __expf(to_float(x[k]) - top);
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (int w = 0; w < kThreads / kWarp; ++w) sum += sums[w];
    const float w = clean_prob(__expf(to_float(x[labels[i]]) - top), sum, prior(*gamma), eps[i]);
    out[i] = w;
    partial[i] = w;
  }
}

// One block: partial sums in a fixed order.
__global__ void __launch_bounds__(kThreads) finish(const double* __restrict__ partial, double* __restrict__ sum, int64_t blocks) {
  double mine = 0;
  for (int64_t b = threadIdx.x; b < blocks; b += kThreads) mine += partial[b];
  add_up(mine, sum);
}

template <class T>
void main_estep_of(const void* logits, const int64_t* labels, const double* gamma, const float* eps, float* out,
                   double* partial, int64_t n, int64_t c, Stream stream) {
  const T* x = static_cast<const T*>(logits);
  const auto blocks = unsigned(main_estep_blocks(n, c));
  auto run = [&](auto kernel, size_t shared) {
    launch(kernel, blocks, kThreads, shared, stream, x, labels, gamma, eps, out, partial, n, c);
  };
  if (c <= kThreadPerRow) return run(thread_per_row<T>, sizeof(float) * size_t(kThreads) * size_t(c | 1));
  if (c <= 256) return run(warp_per_row<T, 8>, 0);
  if (c <= 512) return run(warp_per_row<T, 16>, 0);
  if (c <= 1024) return run(warp_per_row<T, 32>, 0);
  if (c <= kWarpPerRow) return run(warp_per_row<T, 64>, 0);
  run(block_per_row<T>, 0);
}
}  // namespace

int64_t main_estep_blocks(int64_t n, int64_t c) {
  const int64_t rows = c <= kThreadPerRow ? kThreads : c <= kWarpPerRow ? kThreads / kWarp : 1;
  return (n + rows - 1) / rows;
}

void main_estep_cuda(CudaFloat type, const void* logits, const int64_t* labels, const double* gamma, const float* eps,
                     float* clean_prob, double* partial, double* sum, int64_t n, int64_t c, void* stream) {
  auto s = static_cast<Stream>(stream);
  switch (type) {
    case CudaFloat::kFp32: main_estep_of<float>(logits, labels, gamma, eps, clean_prob, partial, n, c, s); break;
    case CudaFloat::kBf16: main_estep_of<__nv_bfloat16>(logits, labels, gamma, eps, clean_prob, partial, n, c, s); break;
    case CudaFloat::kFp16: main_estep_of<__half>(logits, labels, gamma, eps, clean_prob, partial, n, c, s); break;
  }
  launch(finish, 1, kThreads, 0, s, partial, sum, main_estep_blocks(n, c));
}
}  // namespace flywheel
