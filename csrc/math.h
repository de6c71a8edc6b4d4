// The method's scalar formulas, for host and device: one formula, two kernels. F is a float, or on the CPU sixteen.
#pragma once

#ifdef __CUDACC__
#define FLYWHEEL_BOTH __host__ __device__ __forceinline__
#else
#define FLYWHEEL_BOTH static inline __attribute__((always_inline))  // static: a copy for each instruction set
#endif

namespace flywheel {
constexpr float kMinEps = 1e-12f;  // as in reference.py

// gamma and 1 - gamma, the second rounded from float64 on its own: near gamma = 1 a float difference has no digits left.
struct Prior {
  float clean, corrupted;
};
FLYWHEEL_BOTH Prior prior(double gamma) { return {float(gamma), float(1 - gamma)}; }

template <class F>
FLYWHEEL_BOTH F at_least_min_eps(F x) {
  return x < kMinEps ? kMinEps : x;  // a NaN stays one
}

// Step 1: w = gamma g / (gamma g + (1 - gamma) eps), with g = e / sum. Where both terms vanish the prior decides.
template <class F>
FLYWHEEL_BOTH F clean_prob(F e, F sum, Prior prior, F eps) {
  const F clean = prior.clean * e;
  const F total = clean + prior.corrupted * at_least_min_eps(eps) * sum;
  return total == 0.f ? (prior.corrupted == 0.f ? 1.f : 0.f) : clean / total;  // a NaN stays one
}

// Step 2 for one sample: with p(y) = e(y) corruption[y, label], where f(y) = e(y) / sum,
//   (1 - w) r(y) = r p(y),   q(y) = q p(y) + own [y = label],   for the mixture and the joint posterior alike.
template <class F>
struct Posterior {
  F r, q, own, eps;
};
// e_own = e(label), shown = sum of p(y).
template <class F>
FLYWHEEL_BOTH Posterior<F> posterior(bool joint, F w, F e_own, F sum, F shown) {
  const F raw_eps = shown / sum, eps = at_least_min_eps(raw_eps), corrupted = 1.f - w;
  const F r = corrupted / (eps * sum);
  if (!joint) return {r, r, w, eps};
  const F g = w * e_own / sum, total = at_least_min_eps(g + corrupted * raw_eps);
  return {r, corrupted / (total * sum), g / total, eps};
}
}  // namespace flywheel
