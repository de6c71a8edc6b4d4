// CUDA's execution model on the CPU, for tests: what csrc/cuda/simt.cuh includes where no CUDA compiler is at work.
// Each CUDA thread is a fiber, and all of them run on one OS thread, in an order that EMULATION_ORDER chooses: forward,
// reverse, or a number that seeds a random one. Barriers and warp collectives are real; a missing one is a data race
// that ThreadSanitizer sees, a divergent one an error that names file, line and thread. Shared memory starts as NaNs, or
// under EMULATION_MEMORY=huge as numbers of 1e38: what one of them hides, as fmaxf does a NaN, the other shows.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <type_traits>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define EMULATION_TEXT_(x) #x
#define EMULATION_TEXT(x) EMULATION_TEXT_(x)
#define EMULATION_HERE __FILE__ ":" EMULATION_TEXT(__LINE__) " #" EMULATION_TEXT(__COUNTER__)
#define FLYWHEEL_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(emulation::shared())

namespace emulation {
struct Thread {
  uint3 index, block;
  dim3 block_size, grid;
};
extern Thread* self;  // the running fiber

struct Slots {
  alignas(16) unsigned char lane[32][16];
};
void* shared();
void sync_threads(const char* where);
// Hands a value to the warp; returns every lane's once all lanes of `mask` have come. Orders no memory, as on a GPU.
const Slots* exchange(unsigned mask, const void* value, size_t size, const char* where);
void read_slot(const Slots* slots, unsigned lane, void* value, size_t size);  // out of ThreadSanitizer's sight
void run(unsigned blocks, unsigned threads, size_t shared_bytes, void (*body)(void*), void* argument);

// What the kernels did since the last reset. Accesses are counted where they go through load and store.
struct Counters {
  int64_t loaded, stored, wide, exps, barriers, exchanges;  // bytes, bytes, bytes in 16-byte accesses, and calls
  std::vector<size_t> shared;                               // bytes of each launch
};
extern Counters counters;

template <class T>
T from_lane(const Slots* slots, int lane) {
  T value;
  read_slot(slots, unsigned(lane), &value, sizeof value);
  return value;
}
template <class T>
T shuffle_xor(unsigned mask, T value, int step, const char* where) {
  static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
  return from_lane<T>(exchange(mask, &value, sizeof value, where), int(self->index.x % 32) ^ step);
}
// Faults: the harness writes these before barriers and at bounds; EMULATION_FAULT names the one that takes place.
extern const int fault;
inline bool kept(int which) { return fault != which; }
inline int one_more(int which) { return fault == which; }
// Kernels count by calls, out of ThreadSanitizer's sight.
void count_load(size_t size, bool once_a_warp);
void count_store(size_t size);
void count_exp();
}  // namespace emulation

#define threadIdx (emulation::self->index)
#define blockIdx (emulation::self->block)
#define blockDim (emulation::self->block_size)
#define gridDim (emulation::self->grid)
#define __syncthreads() emulation::sync_threads(EMULATION_HERE)
#define __shfl_xor_sync(mask, value, step) emulation::shuffle_xor(mask, value, step, EMULATION_HERE)

namespace flywheel {
using Stream = void*;

// Parameters are converted at the call, as in an ordinary call of the kernel.
template <class... P, class... A>
void launch(void (*kernel)(P...), unsigned blocks, unsigned threads, size_t shared_bytes, Stream, A... arguments) {
  auto call = [=] { kernel(static_cast<P>(arguments)...); };
  emulation::run(blocks, threads, shared_bytes, [](void* p) { (*static_cast<decltype(call)*>(p))(); }, &call);
}
template <class T>
T load(const T* p) {
  emulation::count_load(sizeof(T), false);
  return *p;
}
template <class T>
T load_same(const T* p) {
  emulation::count_load(sizeof(T), true);
  return *p;
}
template <class T>
void store(T* p, T v) {
  emulation::count_store(sizeof(T));
  *p = v;
}
inline float exp_of(float x) {
  emulation::count_exp();
  return std::exp(x);
}
inline float log_of(float x) { return std::log(x); }
}  // namespace flywheel
