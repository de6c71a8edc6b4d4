// The training loss against the posterior, and its gradient: a warp a sample, or a block a sample, with q and the softmax
// in shared memory.
#include "em_step.h"
#include "team.cuh"

namespace flywheel {
namespace {
// A sample's loss, summed over its views, and their gradients; `q` is the team's [2, C] of shared memory.
template <class T, bool kBlock>
__device__ __forceinline__ double loss_of(const LossOperands& a, Team<kBlock> team, int64_t i, float* q) {
  constexpr int kStep = Team<kBlock>::kSize;
  const int c = a.c, rank = team.rank();
  float* g = q + c;
  const int label = int(load_same(a.labels + i));
  const auto read = [&](const void* logits, int64_t row, float* x) {  // one row into shared memory; its maximum
    float most = -INFINITY;
    for (int k = rank; k < c; k += kStep)
      most = fmaxf(most, x[k] = to_float(load(static_cast<const T*>(logits) + row * c + k)));
    return team.max(most);
  };
  // A thread meets the same classes everywhere, so that only reductions need barriers.
  if (a.teacher_logits) {
    const float* t = a.corruption_t + int64_t(label) * c;
    const float top = read(a.teacher_logits, i, q);
    float sum = 0, shown = 0, e_own = 0;
    for (int k = rank; k < c; k += kStep) {
      const float e = exp_of(q[k] - top);
      sum += e;
      if (k == label) e_own = e;
      shown += q[k] = e * load(t + k);
    }
    sum = team.sum(sum);
    shown = team.sum(shown);
    const Posterior<float> m = posterior(a.joint, load_same(a.clean_prob + i), team.sum(e_own), sum, shown);
    for (int k = rank; k < c; k += kStep) q[k] = m.q * q[k] + (k == label ? m.own : 0.f);
  } else {
    for (int k = rank; k < c; k += kStep) q[k] = k == label ? 1.f : 0.f;
  }
  const float scale = 1.f / float(a.views * a.n), per_class = 1.f / float(c);
  double total = 0;
  for (int64_t view = 0; view < a.views; ++view) {
    const int64_t at = (view * a.n + i) * c;
    T* out = static_cast<T*>(a.gradient) + at;
    const float top = read(a.logits, view * a.n + i, g);
    float sum = 0, shares = 0, fit = 0, slope = 0, floor = 0;
    for (int k = rank; k < c; k += kStep) {
      const float x = g[k] - top;
      shares += q[k];
      if (q[k] != 0.f) fit += q[k] * x;  // a class without a share costs nothing, at -inf too
      sum += g[k] = exp_of(x);
    }
    sum = team.sum(sum);
    for (int k = rank; k < c; k += kStep) {
      g[k] /= sum;
      if (a.confidence != 0.f) {
        slope += g[k] * per_class / (g[k] + a.delta);
        floor += log_of(g[k] + a.delta);
      }
    }
    shares = team.sum(shares);
    float loss = log_of(sum) * shares - team.sum(fit);
    if (a.confidence != 0.f) {
      slope = team.sum(slope);
      loss += team.sum(floor) * a.confidence * per_class;
    }
    for (int k = rank; k < c; k += kStep) {
      float d = g[k] * shares - q[k];
      if (a.confidence != 0.f) d += g[k] * (per_class / (g[k] + a.delta) - slope) * a.confidence;
      put(out + k, d * scale);
    }
    total += loss;
  }
  return total;
}

template <class T, bool kBlock>
__global__ void __launch_bounds__(kThreads) loss_of_samples(LossOperands a) {
  FLYWHEEL_DYNAMIC_SHARED(float, q);  // [teams of a block, 2, C]
  constexpr int kTeams = kBlock ? 1 : kWarps;
  const int team = int(threadIdx.x) * kTeams / kThreads;
  const int64_t i = int64_t(blockIdx.x) * kTeams + team;
  auto* slots = reinterpret_cast<Best*>(q + kTeams * 2 * a.c);  // [kWarps]
  const double mine = i < a.n ? loss_of<T, kBlock>(a, {slots}, i, q + team * 2 * a.c) : 0.0;
  if constexpr (kBlock) {
    if (threadIdx.x == 0) store(a.partial + i, mine);
  } else {
    auto* totals = reinterpret_cast<double*>(slots);  // [kWarps]
    if (threadIdx.x % kWarp == 0) totals[team] = mine;
    __syncthreads();
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += totals[w];
    if (threadIdx.x == 0) store(a.partial + blockIdx.x, total);
  }
}

// One block: the blocks' losses in a fixed order.
__global__ void __launch_bounds__(kThreads) mean_loss(LossOperands a, int64_t blocks) {
  FLYWHEEL_DYNAMIC_SHARED(double, warps);  // [kWarps]
  double mine = 0;
  for (int64_t b = threadIdx.x; b < blocks; b += kThreads) mine += load(a.partial + b);
  mine = warp_sum(mine);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += warps[w];
    store(a.loss, float(total / double(a.views * a.n)));
  }
}

template <class T>
void posterior_loss_of(const LossOperands& a, Stream stream) {
  const bool block = whole_block(a.c);
  const int64_t teams = block ? 1 : kWarps, blocks = (a.n + teams - 1) / teams;
  const size_t shared = sizeof(float) * size_t(teams * 2 * a.c) + sizeof(Best) * kWarps;
  launch(block ? loss_of_samples<T, true> : loss_of_samples<T, false>, unsigned(blocks), kThreads, shared, stream, a);
  launch(mean_loss, 1, kThreads, sizeof(double) * kWarps, stream, a, blocks);
}
}  // namespace

void posterior_loss_cuda(CudaFloat type, const LossOperands& a, void* stream) {
  const auto s = static_cast<Stream>(stream);
  switch (type) {
    case CudaFloat::kFp32: return posterior_loss_of<float>(a, s);
    case CudaFloat::kBf16: return posterior_loss_of<__nv_bfloat16>(a, s);
    case CudaFloat::kFp16: return posterior_loss_of<__half>(a, s);
  }
}
}  // namespace flywheel
