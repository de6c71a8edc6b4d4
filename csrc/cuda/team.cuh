// Threads that work on one row together: one warp, or a whole block.
#pragma once
#include "../math.h"
#include "simt.cuh"

namespace flywheel {
namespace {
constexpr int kThreads = 128;  // of every kernel here
constexpr int kWarps = kThreads / kWarp;
constexpr bool whole_block(int c) { return c > 256; }  // works on a row; a warp does on fewer classes

// Reductions over the team; every thread gets the result, and sums are in a fixed order.
template <bool kBlock>
struct Team {
  Best* slots;  // [kWarps] shared; a block's only
  __device__ __forceinline__ int rank() const { return kBlock ? int(threadIdx.x) : int(threadIdx.x) % kWarp; }
  static constexpr int kSize = kBlock ? kThreads : kWarp;

  template <class F>
  __device__ __forceinline__ Best across(Best mine, F join) const {
    if constexpr (kBlock) {
      __syncthreads();  // the last result has been read by all
      if (threadIdx.x % kWarp == 0) slots[threadIdx.x / kWarp] = mine;
      __syncthreads();
      mine = slots[0];
      for (int w = 1; w < kWarps; ++w) mine = join(mine, slots[w]);
    }
    return mine;
  }
  __device__ __forceinline__ float max(float v) const {
    return across({warp_max(v), 0}, [](Best a, Best b) { return Best{fmaxf(a.value, b.value), 0}; }).value;
  }
  __device__ __forceinline__ float sum(float v) const {
    return across({warp_sum(v), 0}, [](Best a, Best b) { return Best{a.value + b.value, 0}; }).value;
  }
  __device__ __forceinline__ Best best(Best mine) const {
    return across(warp_best(mine), [](Best a, Best b) { return better(a, b); });
  }
};

// What the auxiliary network says of one sample, and the outputs that follow.
struct SeenAux {
  float sum, e_own, shown, p_own;
  Best p, f;
};
__device__ __forceinline__ Posterior<float> conclude(bool joint, float w, SeenAux seen, int label, Best* suggested) {
  const Posterior<float> m = posterior(joint, w, seen.e_own, seen.sum, seen.shown);
  *suggested = better({m.q * seen.p_own + m.own, label}, {m.q * seen.p.value, seen.p.label});
  return m;
}

}  // namespace
}  // namespace flywheel
