// The one header of a kernel file. Under nvcc it is CUDA; otherwise the tests' emulation of it on the CPU.
// Kernel files hold no torch, declare shared memory by FLYWHEEL_SHARED, and launch through flywheel::launch.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>

#define FLYWHEEL_SHARED(T, name, size) __shared__ T name[size]
#define FLYWHEEL_DYNAMIC_SHARED(T, name)                               \
  extern __shared__ __align__(16) unsigned char flywheel_dynamic_[]; \
  T* name = reinterpret_cast<T*>(flywheel_dynamic_)

namespace flywheel {
using Stream = cudaStream_t;

template <class... P, class... A>
void launch(void (*kernel)(P...), unsigned blocks, unsigned threads, size_t shared_bytes, Stream stream, A... args) {
  if (blocks == 0) return;
  kernel<<<blocks, threads, shared_bytes, stream>>>(static_cast<P>(args)...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
}  // namespace flywheel
#else
#include "emulation.h"
#endif

namespace flywheel {
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

__device__ __forceinline__ float warp_max(float v) {
  for (int step = kWarp / 2; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, step));
  return v;
}
template <class T>
__device__ __forceinline__ T warp_sum(T v) {
  for (int step = kWarp / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}
}  // namespace flywheel
