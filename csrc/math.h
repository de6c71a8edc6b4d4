// The method's scalar formulas, for host and device: one formula, two kernels.
#pragma once

#ifdef __CUDACC__
#define FLYWHEEL_BOTH __host__ __device__ __forceinline__
#else
#define FLYWHEEL_BOTH inline
#endif

namespace flywheel {
constexpr float kMinEps = 1e-12f;  // as in reference.py

// gamma and 1 - gamma, the second rounded from float64 on its own: near gamma = 1 a float difference has no digits left.
struct Prior {
  float clean, corrupted;
};
FLYWHEEL_BOTH Prior prior(double gamma) { return {float(gamma), float(1 - gamma)}; }

// Step 1: w = gamma g / (gamma g + (1 - gamma) eps), with g = e / sum. Where both terms vanish the prior decides.
FLYWHEEL_BOTH float clean_prob(float e, float sum, Prior prior, float eps) {
  const float clean = prior.clean * e;
  const float corrupted = prior.corrupted * (eps < kMinEps ? kMinEps : eps) * sum;
  const float total = clean + corrupted;
  return total == 0.f ? (prior.corrupted == 0.f ? 1.f : 0.f) : clean / total;  // a NaN stays one
}
}  // namespace flywheel
