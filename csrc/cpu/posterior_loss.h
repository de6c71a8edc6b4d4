// The training loss against the posterior for a range of samples, and its gradient; the posterior is never stored.
// Compiled once for each instruction set; included by cpu/kernels_*.cpp only.
#pragma once
#include "em_step.h"

namespace {
using flywheel::PosteriorLoss;

// q of sixteen samples, [kGroup, padded] with zeros after C, from the teacher's logits.
template <class T>
inline void targets(const PosteriorLoss& a, const int64_t* sample, int count, Rows<T>& rows, float* e, float* q) {
  const EmStep& s = *a.teacher;
  const int64_t padded = flywheel::padded(s.c);
  gather_rows(rows, s.aux_logits, s.n, s.c, sample, count);
  const SeenAux seen = see_aux_rows(rows, count, s, e);
  Vf w = {};
  for (int i = 0; i < count; ++i) w[i] = s.clean_in[sample[i]];
  const auto m = flywheel::posterior(s.joint, w, seen.e_own, seen.sum, seen.shown);
  for (int i = 0; i < count; ++i) {
    const int64_t label = rows.label[i];
    const float* t = s.corruption_t + label * s.width;
    each_vector(s.width, [&](int64_t k, auto load_) __attribute__((always_inline)) {
      store(q + i * padded + k, load(e + i * padded + k) * load_(t + k, label + 1 < s.c, 0.f) * m.q[i]);
    });
    q[i * padded + label] += m.own[i];
  }
}

template <class T>
double posterior_loss_rows(const PosteriorLoss& a, float* scratch, int64_t begin, int64_t end, int64_t* bad) {
  const int64_t c = a.c, padded = flywheel::padded(c);
  float *e = scratch, *q = scratch + kGroup * padded, *g = scratch + 2 * kGroup * padded;
  const float per_class = 1.f / float(c);
  double total = 0;
  for (int64_t at = begin; at < end; at += kGroup) {
    const int count = int(end - at < kGroup ? end - at : kGroup);
    int64_t sample[kGroup], label[kGroup];
    for (int i = 0; i < kGroup; ++i) {
      sample[i] = at + (i < count ? i : 0);
      label[i] = a.labels[sample[i]];
    }
    Rows<T> rows;
    if (!load_labels(label, c, rows.label)) {
      for (int i = kGroup - 1; i >= 0; --i)
        if (label[i] < 0 || label[i] >= c) *bad = sample[i];
      return 0;
    }
    if (a.teacher) {
      targets(a, sample, count, rows, e, q);
    } else {
      std::memset(q, 0, sizeof(float) * size_t(kGroup * padded));
      for (int i = 0; i < count; ++i) q[i * padded + rows.label[i]] = 1.f;
    }
    for (int64_t view = 0; view < a.views; ++view) {
      int64_t row[kGroup];
      for (int i = 0; i < kGroup; ++i) row[i] = view * a.n + sample[i];
      gather_rows(rows, a.logits, a.views * a.n, c, row, count);
      const Vf top = tops_of(rows, count, c);
      Vf part[kGroup], q_sum[kGroup], fit[kGroup], slope[kGroup], floor[kGroup];
      for (int i = 0; i < kGroup; ++i) {
        part[i] = q_sum[i] = fit[i] = slope[i] = floor[i] = splat(0.f);
        if (i >= count) continue;
        const Vf top_ = splat(top[i]);
        each_vector(c, [&](int64_t k, auto load_) __attribute__((always_inline)) {
          const Vf x = load_(rows.x[i] + k, rows.roomy, -__builtin_inff()) - top_;
          const Vf v = exp_nonpositive(x), target = load(q + i * padded + k);
          store(g + i * padded + k, v);
          part[i] += v;
          q_sum[i] += target;
          fit[i] += target == 0.f ? splat(0.f) : target * x;  // a class without a share costs nothing, at -inf too
        });
      }
      const Vf sum = sums_of(part), shares = sums_of(q_sum), inverse = 1.f / sum;
      Vf loss = log_positive(sum) * shares - sums_of(fit), mean_slope = {};
      if (a.confidence != 0) {
        for (int i = 0; i < count; ++i)
          for (int64_t k = 0; k < padded; k += kLanes) {
            const Vf p = load(g + i * padded + k) * inverse[i], floored = p + a.delta;
            const Vi real = kLane < int32_t(c - k);
            slope[i] += p * per_class / floored;
            floor[i] += real ? log_positive(floored) : splat(0.f);
          }
        mean_slope = sums_of(slope);
        loss += sums_of(floor) * (a.confidence * per_class);
      }
      for (int i = 0; i < count; ++i) {
        total += double(loss[i]);
        T* out = static_cast<T*>(a.gradient) + (view * a.n + sample[i]) * c;
        for (int64_t k = 0; k < padded; k += kLanes) {
          const Vf p = load(g + i * padded + k) * inverse[i];
          Vf d = p * shares[i] - load(q + i * padded + k);
          if (a.confidence != 0) d += p * (per_class / (p + a.delta) - mean_slope[i]) * a.confidence;
          d *= a.scale;
          const int some = int(c - k < kLanes ? c - k : kLanes);
          for (int l = 0; l < some; ++l) put(out + k + l, d[l]);
        }
      }
    }
  }
  return total;
}
}  // namespace
