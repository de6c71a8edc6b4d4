// The expectation steps for a range of rows, compiled once for each instruction set; included by cpu/kernels_*.cpp only.
// Sixteen rows are worked on together. Up to 32 classes a row is a lane: the group is transposed on the way in, and
// nothing is ever added across lanes. Above, vectors run along the row, and what they found of sixteen rows is
// transposed and added at once. Either way the formulas see sixteen rows in a vector.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace {
using flywheel::EmPart;
using flywheel::EmStep;
using flywheel::kFlush;
using flywheel::kGroup;
using flywheel::kLaneClasses;
constexpr int64_t kWideClasses = 256;  // above, sixteen rows of terms would not stay in the first cache
static_assert(kGroup == kLanes);

// Sixteen rows of the [N, C] logits and their labels; past `count` they repeat the first one.
template <class T>
struct Rows {
  const T* x[kGroup];
  bool roomy;  // padded(C) elements of each row can be read without leaving the tensor
  Vi label;
};

// What a network says of sixteen rows, a row a lane: softmax(x)(y) = e(y) / sum.
struct Seen {
  Vf sum, e_own;
};
// The same of the auxiliary network; p(y) = e(y) corruption[y, label].
struct SeenAux : Seen {
  Vf shown, p_own, p_most;
  Vi p_class, f_class;
};

// A row's last vector, where `count` < 16 elements are its own.
template <class T>
inline Vf load_tail(const T* p, int64_t count, bool roomy, float rest) {
  if (!roomy) return load_some(p, int(count), rest);
  return kLane < int32_t(count) ? load(p) : splat(rest);
}
// Calls f(k, load) for k = 0, 16, ... < c, where load(p, roomy, rest) reads classes k.. of a row of c.
template <class F>
inline __attribute__((always_inline)) void each_vector(int64_t c, const F& f) {
  int64_t k = 0;
  for (; k + kLanes <= c; k += kLanes) f(k, [](const auto* p, bool, float) __attribute__((always_inline)) { return load(p); });
  if (k < c) f(k, [&](const auto* p, bool roomy, float rest) __attribute__((always_inline)) { return load_tail(p, c - k, roomy, rest); });
}

// The group as columns: column[k] holds element k of sixteen rows.
template <int kBlocks, class T>
inline void columns_of(const Rows<T>& rows, int64_t c, Vf* column) {
  for (int b = 0; b < kBlocks; ++b) {
    for (int i = 0; i < kGroup; ++i) {
      const T* x = rows.x[i] + b * kLanes;
      column[b * kLanes + i] = rows.roomy || c >= (b + 1) * kLanes ? load(x) : load_some(x, int(c - b * kLanes), 0.f);
    }
    transpose16(column + b * kLanes);
  }
}
inline Vf softmax_terms(Vf* column, int64_t c) {
  Vf top = column[0];
  for (int64_t k = 1; k < c; ++k) top = max(top, column[k]);
  Vf sum = splat(0.f);
  for (int64_t k = 0; k < c; ++k) sum += column[k] = exp_nonpositive(column[k] - top);
  return sum;
}

template <int kBlocks, class T>
Seen see_lanes(const Rows<T>& rows, int64_t c) {
  Vf column[kBlocks * kLanes];
  columns_of<kBlocks>(rows, c, column);
  Seen seen;
  seen.sum = softmax_terms(column, c);
  seen.e_own = column[0];
  for (int64_t k = 1; k < c; ++k) seen.e_own = rows.label == int32_t(k) ? column[k] : seen.e_own;
  return seen;
}

// Adds softmax(x) of the first `count` rows to the sums of `f` [C, 16], a row a lane, where they are wanted.
template <int kBlocks, class T>
SeenAux see_aux_lanes(const Rows<T>& rows, int count, const EmStep& s, float* e, float* f_sums) {
  constexpr int64_t kPadded = kBlocks * kLanes;
  Vf column[kPadded];
  columns_of<kBlocks>(rows, s.c, column);
  SeenAux seen;
  seen.sum = softmax_terms(column, s.c);
  seen.e_own = seen.shown = seen.p_own = splat(0.f);
  seen.p_most = splat(-1.f);
  seen.p_class = seen.f_class = Vi{};
  Vf f_most = splat(-1.f);
  const Vf inverse = kLane < count ? 1.f / seen.sum : splat(0.f);
  for (int64_t k = 0; f_sums && k < s.c; ++k) store(f_sums + k * kLanes, load(f_sums + k * kLanes) + column[k] * inverse);
  for (int64_t k = 0; k < s.c; ++k) {
    const float* shown_as = s.corruption + k * kPadded;
    const Vf t = kBlocks == 1 ? pick(load(shown_as), rows.label) : pick(load(shown_as), load(shown_as + kLanes), rows.label);
    const Vf p = column[k] * t, f = column[k] * s.align[k];
    const Vi here = rows.label == int32_t(k), more_p = p > seen.p_most, more_f = f > f_most;
    seen.shown += p;
    seen.e_own = here ? column[k] : seen.e_own;
    seen.p_own = here ? p : seen.p_own;
    seen.p_most = more_p ? p : seen.p_most;
    seen.p_class = more_p ? splat(int32_t(k)) : seen.p_class;
    f_most = more_f ? f : f_most;
    seen.f_class = more_f ? splat(int32_t(k)) : seen.f_class;
  }
  for (int b = 0; b < kBlocks; ++b) {
    for (int64_t k = b * kLanes > s.c ? b * kLanes : s.c; k < (b + 1) * kLanes; ++k) column[k] = splat(0.f);
    transpose16(column + b * kLanes);
    for (int i = 0; i < kGroup; ++i) store(e + i * kPadded + b * kLanes, column[b * kLanes + i]);
  }
  return seen;
}

template <class T>
inline Vf tops_of(const Rows<T>& rows, int count, int64_t c) {
  Vf top[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    Vf top_ = splat(-__builtin_inff());
    if (i < count)
      each_vector(c, [&](int64_t k, auto load_) __attribute__((always_inline)) {
        top_ = max(top_, load_(rows.x[i] + k, rows.roomy, -__builtin_inff()));
      });
    top[i] = top_;
  }
  return maxima_of(top);
}

template <class T>
Seen see_rows(const Rows<T>& rows, int count, int64_t c) {
  const Vf top = tops_of(rows, count, c);
  Vf sum[kGroup], own = {};
  for (int i = 0; i < kGroup; ++i) {
    Vf sum_ = splat(0.f);
    const Vf top_ = splat(top[i]);
    if (i < count) {
      each_vector(c, [&](int64_t k, auto load_) __attribute__((always_inline)) {
        sum_ += exp_nonpositive(load_(rows.x[i] + k, rows.roomy, -__builtin_inff()) - top_);
      });
      own[i] = to_float(rows.x[i][rows.label[i]]);
    }
    sum[i] = sum_;
  }
  return {sums_of(sum), exp_nonpositive(own - top)};
}

// Lane i: the class of the greatest value[i][.], the lowest one among equals.
inline Vi classes_of(Vf* value, Vi* class_of, Vf& most) {
  transpose16(value);
  transpose16(reinterpret_cast<Vf*>(class_of));
  most = value[0];
  Vi found = class_of[0];
  for (int i = 1; i < kLanes; ++i) {
    const Vi better = (value[i] > most) | ((value[i] == most) & (class_of[i] < found));
    most = better ? value[i] : most;
    found = better ? class_of[i] : found;
  }
  return found;
}

template <class T>
SeenAux see_aux_rows(const Rows<T>& rows, int count, const EmStep& s, float* e) {
  const int64_t padded = flywheel::padded(s.c);
  const Vf top = tops_of(rows, count, s.c);
  Vf sum[kGroup], shown[kGroup], p_most[kGroup], f_most[kGroup], e_own = {}, t_own = {};
  Vi p_class[kGroup], f_class[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    Vf sum_ = splat(0.f), shown_ = splat(0.f), p_most_ = splat(-1.f), f_most_ = splat(-1.f);
    Vi p_class_ = {}, f_class_ = {}, class_of = kLane;
    if (i < count) {
      const int64_t label = rows.label[i];
      const float* t = s.corruption_t + label * s.width;
      const bool roomy_t = s.width > s.c || label + 1 < s.c;  // another row of the table follows
      const Vf top_ = splat(top[i]);
      each_vector(s.c, [&](int64_t k, auto load_) __attribute__((always_inline)) {
        const Vf v = exp_nonpositive(load_(rows.x[i] + k, rows.roomy, -__builtin_inff()) - top_);
        store(e + i * padded + k, v);
        const Vf p = v * load_(t + k, roomy_t, 0.f), f = v * load(s.align + k);
        const Vi more_p = p > p_most_, more_f = f > f_most_;
        sum_ += v;
        shown_ += p;
        p_most_ = max(p_most_, p);
        p_class_ = more_p ? class_of : p_class_;
        f_most_ = max(f_most_, f);
        f_class_ = more_f ? class_of : f_class_;
        class_of += kLanes;
      });
      e_own[i] = e[i * padded + rows.label[i]];
      t_own[i] = t[rows.label[i]];
    }
    sum[i] = sum_, shown[i] = shown_, p_most[i] = p_most_, f_most[i] = f_most_, p_class[i] = p_class_, f_class[i] = f_class_;
  }
  SeenAux seen;
  Vf ignored;
  seen.sum = sums_of(sum);
  seen.shown = sums_of(shown);
  seen.e_own = e_own;
  seen.p_own = e_own * t_own;
  seen.p_class = classes_of(p_most, p_class, seen.p_most);
  seen.f_class = classes_of(f_most, f_class, ignored);
  return seen;
}

// Moves a label's float32 statistics to float64. They are sums of m e(k): corruption(k, label) is the same for all of them.
inline void flush(const EmStep& s, EmPart& part, int64_t label) {
  const float* t = s.corruption_t + label * s.width;
  float* r32 = part.r32 + label * part.stride;
  float* q32 = s.joint ? part.q32 + label * part.stride : r32;
  double *r = part.r + label * s.c, *q = part.q ? part.q + label * s.c : nullptr;
  for (int side = 0; side < 2; ++side)
    if (part.edge_label[side] == label) r = part.edge + side * 2 * s.c, q = r + s.c;
  for (int64_t k = 0; k < s.c; ++k) r[k] += double(t[k]) * double(r32[k]);
  for (int64_t k = 0; q && k < s.c; ++k) q[k] += double(t[k]) * double(q32[k]);
  (q ? q[label] : part.own[label]) += double(part.own32[label]);
  const size_t bytes = sizeof(float) * size_t(flywheel::padded(s.c));
  std::memset(r32, 0, bytes);
  if (s.joint) std::memset(q32, 0, bytes);
  part.own32[label] = 0;
  part.count[label] = 0;
}
inline void flush_classes(const EmStep& s, EmPart& part) {
  const int64_t lanes = s.c <= kLaneClasses ? kLanes : 1;
  for (int64_t k = 0; k < s.c * lanes; ++k) part.f[k / lanes] += double(part.f32[k]), part.f32[k] = 0;
}

// softmax(x) of sixteen rows, where a row is not a lane, to the sums of every class.
inline void add_classes(const EmStep& s, EmPart& part, int count, Vf inverse) {
  const int64_t padded = flywheel::padded(s.c);
  for (int64_t k = 0; k < padded; k += kLanes) {
    Vf sum = load(part.f32 + k);
    for (int i = 0; i < count; ++i) sum += load(part.e + i * padded + k) * inverse[i];
    store(part.f32 + k, sum);
  }
}

inline void add_row(const EmStep& s, EmPart& part, const float* e, int64_t label, flywheel::Posterior<float> m) {
  const int64_t padded = flywheel::padded(s.c);
  float *r = part.r32 + label * part.stride, *q = part.q32 + label * part.stride;
  for (int64_t k = 0; k < padded; k += kLanes) {
    store(r + k, load(r + k) + load(e + k) * m.r);
    if (s.joint) store(q + k, load(q + k) + load(e + k) * m.q);
  }
  part.own32[label] += m.own;
  if (++part.count[label] == kFlush) flush(s, part, label);
}

inline void write_q(const EmStep& s, const float* e, int64_t row, int64_t label, flywheel::Posterior<float> m) {
  const float* t = s.corruption_t + label * s.width;
  float* q = s.q + row * s.c;
  for (int64_t k = 0; k < s.c; ++k) q[k] = m.q * (e[k] * t[k]);
  q[label] += m.own;
}

// Rows row[0..count) of [n, c].
template <class T>
inline void gather_rows(Rows<T>& rows, const void* logits, int64_t n, int64_t c, const int64_t* row, int count) {
  int64_t last = row[0];
  for (int i = 0; i < kGroup; ++i) {
    const int64_t at = row[i < count ? i : 0];
    rows.x[i] = static_cast<const T*>(logits) + at * c;
    last = at > last ? at : last;
  }
  rows.roomy = (n - last) * c >= flywheel::padded(c);
}

template <class T>
void em_step_rows(const EmStep& s, EmPart& part, int64_t begin, int64_t end) {
  int64_t last_label = -1, since_flush = 0;
  Vd8 clean = {};
  const int64_t group = s.c > kWideClasses ? kGroup / 4 : kGroup;
  for (int64_t at = begin; at < end; at += group) {
    const int count = int(end - at < group ? end - at : group);
    const bool in_a_row = count == kGroup && !s.order;  // what is per sample lies in whole vectors
    int64_t row[kGroup], label[kGroup];
    for (int i = 0; i < kGroup; ++i) {
      const int64_t position = at + (i < count ? i : 0);
      row[i] = s.order ? s.order[position] : position;
      label[i] = s.labels[row[i]];
    }
    Rows<T> rows;
    if (!load_labels(label, s.c, rows.label)) {
      for (int i = kGroup - 1; i >= 0; --i)
        if (label[i] < 0 || label[i] >= s.c) part.bad = row[i];
      return;
    }
    const auto gathered = [&](const float* from) {
      if (in_a_row) return load(from + at);
      Vf v = {};
      for (int i = 0; i < count; ++i) v[i] = from[row[i]];
      return v;
    };
    const auto put_each = [&](auto* to, auto v) {
      if (in_a_row) return store(to + at, v);
      for (int i = 0; i < count; ++i) to[row[i]] = v[i];
    };

    Vf w;
    if (s.main_logits) {
      gather_rows(rows, s.main_logits, s.n, s.c, row, count);
      const Seen seen = s.c <= kLanes ? see_lanes<1>(rows, s.c) : s.c <= kLaneClasses ? see_lanes<2>(rows, s.c) : see_rows(rows, count, s.c);
      w = flywheel::clean_prob(seen.e_own, seen.sum, s.prior, gathered(s.main_eps));
      put_each(s.clean_prob, w);
      add_to(clean, kLane < count ? w : splat(0.f));
    } else {
      w = gathered(s.clean_in);
    }
    if (!s.aux_logits) continue;

    gather_rows(rows, s.aux_logits, s.n, s.c, row, count);
    float* f_sums = part.sums ? part.f32 : nullptr;
    const SeenAux seen = s.c <= kLanes         ? see_aux_lanes<1>(rows, count, s, part.e, f_sums)
                         : s.c <= kLaneClasses ? see_aux_lanes<2>(rows, count, s, part.e, f_sums)
                                               : see_aux_rows(rows, count, s, part.e);
    const auto m = flywheel::posterior(s.joint, w, seen.e_own, seen.sum, seen.shown);
    if (s.eps) {
      const Vf q_own = m.q * seen.p_own + m.own, q_most = m.q * seen.p_most;
      const Vi other = (q_most > q_own) | ((q_most == q_own) & (seen.p_class < rows.label));
      put_each(s.resampled, seen.f_class);
      put_each(s.suggested, other ? seen.p_class : rows.label);
      put_each(s.suggested_prob, other ? q_most : q_own);
      put_each(s.eps, m.eps);
    }
    const int64_t padded = flywheel::padded(s.c);
    for (int i = 0; i < count && (s.q || part.sums); ++i) {
      const flywheel::Posterior<float> own = {m.r[i], m.q[i], m.own[i], m.eps[i]};
      if (s.q) write_q(s, part.e + i * padded, row[i], label[i], own);
      if (!part.sums) continue;
      if (part.stride == 0 && label[i] != last_label && last_label >= 0) flush(s, part, last_label);
      last_label = label[i];
      add_row(s, part, part.e + i * padded, label[i], own);
    }
    if (!part.sums) continue;
    if (s.c > kLaneClasses) add_classes(s, part, count, 1.f / seen.sum);
    if ((since_flush += count) >= kFlush) flush_classes(s, part), since_flush = 0;
  }
  for (int l = 0; l < 8; ++l) part.clean += clean[l];
  if (!part.sums) return;
  for (int64_t j = 0; j < s.c; ++j)
    if (part.count[j]) flush(s, part, j);
  flush_classes(s, part);
}
}  // namespace
