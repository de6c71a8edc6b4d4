// The main E-step for a range of rows, compiled once for each instruction set; included by cpu/kernels_*.cpp only.
#include "../math.h"
#include "simd.h"

namespace {
constexpr int64_t kTransposed = 32;  // up to so many classes, sixteen rows are worked on at once, one to a lane

struct MainEStep {
  const void* logits;  // [N, C]
  const int64_t* labels;
  flywheel::Prior prior;
  const float* eps;
  float* clean_prob;
  int64_t num_classes;
};

template <class T>
float one_row(const T* x, int64_t c, int64_t label, flywheel::Prior prior, float eps) {
  const int64_t whole = c / kLanes * kLanes;
  const int tail = int(c - whole);
  Vf top = splat(-__builtin_inff());
  for (int64_t k = 0; k < whole; k += kLanes) top = max(top, load(x + k));
  if (tail) top = max(top, load_some(x + whole, tail, -__builtin_inff()));
  const float m = reduce_max(top);
  Vf sum = splat(0.f);
  for (int64_t k = 0; k < whole; k += kLanes) sum += exp_nonpositive(load(x + k) - m);
  if (tail) {
    const Vf e = exp_nonpositive(load_some(x + whole, tail, m) - m);
    for (int k = 0; k < tail; ++k) sum[k] += e[k];
  }
  const float e = exp_nonpositive(splat(to_float(x[label]) - m))[0];
  return flywheel::clean_prob(e, reduce_sum(sum), prior, eps);
}

template <class T>
void sixteen_rows(const T* x, int64_t c, const int64_t* labels, flywheel::Prior prior, const float* eps, float* out) {
  Vf column[kTransposed];
  for (int row = 0; row < kLanes; ++row)
    for (int64_t k = 0; k < c; ++k) column[k][row] = to_float(x[row * c + k]);
  Vf top = column[0];
  for (int64_t k = 1; k < c; ++k) top = max(top, column[k]);
  Vf sum = splat(0.f);
  for (int64_t k = 0; k < c; ++k) sum += column[k] = exp_nonpositive(column[k] - top);
  for (int row = 0; row < kLanes; ++row) out[row] = flywheel::clean_prob(column[labels[row]][row], sum[row], prior, eps[row]);
}

// Rows [begin, end); returns the sum of their clean_prob in float64.
template <class T>
double main_estep_rows(const MainEStep& a, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(a.logits);
  const int64_t c = a.num_classes;
  int64_t row = begin;
  if (c <= kTransposed)
    for (; row + kLanes <= end; row += kLanes)
      sixteen_rows(x + row * c, c, a.labels + row, a.prior, a.eps + row, a.clean_prob + row);
  for (; row < end; ++row) a.clean_prob[row] = one_row(x + row * c, c, a.labels[row], a.prior, a.eps[row]);
  double total = 0;
  for (row = begin; row < end; ++row) total += a.clean_prob[row];
  return total;
}
}  // namespace
