// The one header of a kernel file. Under nvcc it is CUDA; otherwise the tests' emulation of it on the CPU.
// Kernel files hold no torch, declare shared memory by FLYWHEEL_DYNAMIC_SHARED, launch through flywheel::launch, and
// reach global memory through load and store only: the emulation counts there.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>

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

template <class T>
__device__ __forceinline__ T load(const T* p) { return *p; }
// The same address in every lane of a warp.
template <class T>
__device__ __forceinline__ T load_same(const T* p) { return *p; }
template <class T>
__device__ __forceinline__ void store(T* p, T v) { *p = v; }
__device__ __forceinline__ float exp_of(float x) { return __expf(x); }
__device__ __forceinline__ float log_of(float x) { return __logf(x); }
}  // namespace flywheel
#else
#include "emulation.h"
#endif

namespace flywheel {
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// `<` stands only where one more would be wrong: the tests turn each into `<=` and expect to see it.
template <class T>
__host__ __device__ __forceinline__ T least(T a, T b) { return a > b ? b : a; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
// Of a number that one thread owns: not atomic.
__device__ __forceinline__ void add_to(double* p, double v) { store(p, load(p) + v); }
__device__ __forceinline__ void put(float* p, float x) { store(p, x); }
__device__ __forceinline__ void put(__nv_bfloat16* p, float x) { store(p, __float2bfloat16(x)); }
__device__ __forceinline__ void put(__half* p, float x) { store(p, __float2half(x)); }

__device__ __forceinline__ float warp_max(float v) {
  for (int step = kWarp / 2; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, step));
  return v;
}
template <class T>
__device__ __forceinline__ T warp_sum(T v) {
  for (int step = kWarp / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}

// A value and the class it belongs to; the greater one wins, the lower class among equals.
struct Best {
  float value = -1.f;
  int label = 0;
};
__device__ __forceinline__ Best better(Best a, Best b) {
  return b.value > a.value || (b.value == a.value && a.label > b.label) ? b : a;
}
__device__ __forceinline__ Best warp_best(Best mine) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const Best other = {__shfl_xor_sync(kAllLanes, mine.value, step), __shfl_xor_sync(kAllLanes, mine.label, step)};
    mine = better(mine, other);
  }
  return mine;
}
}  // namespace flywheel
