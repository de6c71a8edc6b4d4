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
static_assert(kGroup == kLanes);
constexpr int64_t kLaneClasses = 32;

// Sixteen rows of the [N, C] logits and their labels; past `count` they repeat the first one.
template <class T>
struct Rows {
  const T* x[kGroup];
  int64_t room[kGroup];  // elements from x[i] to the end of the tensor
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

template <class T>
inline Vf load_within(const T* p, int64_t count, int64_t room, float rest) {
  if (count >= kLanes) return load(p);
  if (room < kLanes) return load_some(p, int(count), rest);
  return kLane < int32_t(count) ? load(p) : splat(rest);
}

// The group as columns: column[k] holds element k of sixteen rows.
template <int kBlocks, class T>
inline void columns_of(const Rows<T>& rows, int64_t c, Vf* column) {
  for (int b = 0; b < kBlocks; ++b) {
    for (int i = 0; i < kGroup; ++i) column[b * kLanes + i] = load_within(rows.x[i] + b * kLanes, c - b * kLanes, rows.room[i] - b * kLanes, 0.f);
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

template <int kBlocks, class T>
SeenAux see_aux_lanes(const Rows<T>& rows, const EmStep& s, float* e) {
  constexpr int64_t kPadded = kBlocks * kLanes;
  Vf column[kPadded];
  columns_of<kBlocks>(rows, s.c, column);
  SeenAux seen;
  seen.sum = softmax_terms(column, s.c);
  seen.e_own = seen.shown = seen.p_own = splat(0.f);
  seen.p_most = splat(-1.f);
  seen.p_class = seen.f_class = Vi{};
  Vf f_most = splat(-1.f);
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
    top[i] = splat(-__builtin_inff());
    if (i < count)
      for (int64_t k = 0; k < c; k += kLanes) top[i] = max(top[i], load_within(rows.x[i] + k, c - k, rows.room[i] - k, -__builtin_inff()));
  }
  return maxima_of(top);
}

template <class T>
Seen see_rows(const Rows<T>& rows, int count, int64_t c) {
  const Vf top = tops_of(rows, count, c);
  Vf sum[kGroup], own = {};
  for (int i = 0; i < kGroup; ++i) {
    sum[i] = splat(0.f);
    if (i >= count) continue;
    for (int64_t k = 0; k < c; k += kLanes)
      sum[i] += exp_nonpositive(load_within(rows.x[i] + k, c - k, rows.room[i] - k, -__builtin_inff()) - top[i]);
    own[i] = to_float(rows.x[i][rows.label[i]]);
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
      const float* t = s.corruption_t + rows.label[i] * padded;
      const Vf top_ = splat(top[i]);
      for (int64_t k = 0; k < padded; k += kLanes, class_of += kLanes) {
        const Vf v = exp_nonpositive(load_within(rows.x[i] + k, s.c - k, rows.room[i] - k, -__builtin_inff()) - top_);
        store(e + i * padded + k, v);
        const Vf p = v * load(t + k), f = v * load(s.align + k);
        const Vi more_p = p > p_most_, more_f = f > f_most_;
        sum_ += v;
        shown_ += p;
        p_most_ = max(p_most_, p);
        p_class_ = more_p ? class_of : p_class_;
        f_most_ = max(f_most_, f);
        f_class_ = more_f ? class_of : f_class_;
      }
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

// Moves a label's float32 statistics to float64.
inline void flush(const EmStep& s, EmPart& part, int64_t label) {
  float* r32 = part.r32 + label * part.stride;
  float* q32 = s.joint ? part.q32 + label * part.stride : r32;
  double *r = part.r + label * s.c, *q = part.q + label * s.c;
  for (int side = 0; side < 2; ++side)
    if (part.edge_label[side] == label) r = part.edge + side * 2 * s.c, q = r + s.c;
  for (int64_t k = 0; k < s.c; ++k) r[k] += double(r32[k]), q[k] += double(q32[k]);
  q[label] += double(part.own32[label]);
  const size_t bytes = sizeof(float) * size_t(flywheel::padded(s.c));
  std::memset(r32, 0, bytes);
  std::memset(q32, 0, bytes);
  part.own32[label] = 0;
  part.count[label] = 0;
}
inline void flush_classes(const EmStep& s, EmPart& part) {
  for (int64_t k = 0; k < s.c; ++k) part.f[k] += double(part.f32[k]), part.f32[k] = 0;
}

inline void add_row(const EmStep& s, EmPart& part, const float* e, int64_t label, float inverse, flywheel::Posterior<float> m) {
  const int64_t padded = flywheel::padded(s.c);
  const float* t = s.corruption_t + label * padded;
  float *r = part.r32 + label * part.stride, *q = part.q32 + label * part.stride, *f = part.f32;
  for (int64_t k = 0; k < padded; k += kLanes) {
    const Vf v = load(e + k), p = v * load(t + k);
    store(f + k, load(f + k) + v * inverse);
    store(r + k, load(r + k) + p * m.r);
    if (s.joint) store(q + k, load(q + k) + p * m.q);
  }
  part.own32[label] += m.own;
  if (++part.count[label] == kFlush) flush(s, part, label);
}

inline void write_q(const EmStep& s, const float* e, int64_t row, int64_t label, flywheel::Posterior<float> m) {
  const float* t = s.corruption_t + label * flywheel::padded(s.c);
  float* q = s.q + row * s.c;
  for (int64_t k = 0; k < s.c; ++k) q[k] = m.q * (e[k] * t[k]);
  q[label] += m.own;
}

template <class T>
inline void gather_rows(Rows<T>& rows, const T* x, const EmStep& s, const int64_t* row, int count) {
  for (int i = 0; i < kGroup; ++i) {
    const int64_t at = row[i < count ? i : 0];
    rows.x[i] = x + at * s.c;
    rows.room[i] = (s.n - at) * s.c;
  }
}

template <class T>
void em_step_rows(const EmStep& s, EmPart& part, int64_t begin, int64_t end) {
  int64_t last_label = -1, since_flush = 0;
  for (int64_t at = begin; at < end; at += kGroup) {
    const int count = int(end - at < kGroup ? end - at : kGroup);
    int64_t row[kGroup];
    Rows<T> rows;
    rows.label = Vi{};
    for (int i = 0; i < kGroup; ++i) {
      row[i] = i >= count ? row[0] : s.order ? s.order[at + i] : at + i;
      const int64_t label = s.labels[row[i]];
      if (label < 0 || label >= s.c) {
        part.bad = row[i];
        return;
      }
      rows.label[i] = int32_t(label);
    }
    const auto gathered = [&](const float* from) {
      Vf v = {};
      for (int i = 0; i < count; ++i) v[i] = from[row[i]];
      return s.order || count < kGroup ? v : load(from + at);
    };

    Vf w;
    if (s.main_logits) {
      gather_rows(rows, static_cast<const T*>(s.main_logits), s, row, count);
      const Seen seen = s.c <= kLanes ? see_lanes<1>(rows, s.c) : s.c <= kLaneClasses ? see_lanes<2>(rows, s.c) : see_rows(rows, count, s.c);
      w = flywheel::clean_prob(seen.e_own, seen.sum, s.prior, gathered(s.main_eps));
      for (int i = 0; i < count; ++i) part.clean += double(s.clean_prob[row[i]] = w[i]);
    } else {
      w = gathered(s.clean_in);
    }
    if (!s.aux_logits) continue;

    gather_rows(rows, static_cast<const T*>(s.aux_logits), s, row, count);
    const SeenAux seen = s.c <= kLanes         ? see_aux_lanes<1>(rows, s, part.e)
                         : s.c <= kLaneClasses ? see_aux_lanes<2>(rows, s, part.e)
                                               : see_aux_rows(rows, count, s, part.e);
    const auto m = flywheel::posterior(s.joint, w, seen.e_own, seen.sum, seen.shown);
    const Vf inverse = 1.f / seen.sum, q_own = m.q * seen.p_own + m.own, q_most = m.q * seen.p_most;
    const Vi other = (q_most > q_own) | ((q_most == q_own) & (seen.p_class < rows.label));
    const Vi suggested = other ? seen.p_class : rows.label;
    const Vf suggested_prob = other ? q_most : q_own;
    const int64_t padded = flywheel::padded(s.c);
    for (int i = 0; i < count; ++i) {
      if (s.eps) {
        s.resampled[row[i]] = seen.f_class[i];
        s.suggested[row[i]] = suggested[i];
        s.suggested_prob[row[i]] = suggested_prob[i];
        s.eps[row[i]] = m.eps[i];
      }
      const int64_t label = rows.label[i];
      const flywheel::Posterior<float> own = {m.r[i], m.q[i], m.own[i], m.eps[i]};
      if (s.q) write_q(s, part.e + i * padded, row[i], label, own);
      if (part.sums) {
        if (part.stride == 0 && label != last_label && last_label >= 0) flush(s, part, last_label);
        last_label = label;
        add_row(s, part, part.e + i * padded, label, inverse[i], own);
      }
    }
    if (part.sums && (since_flush += count) >= kFlush) flush_classes(s, part), since_flush = 0;
  }
  if (!part.sums) return;
  for (int64_t j = 0; j < s.c; ++j)
    if (part.count[j]) flush(s, part, j);
  flush_classes(s, part);
}

// Columns [begin, end) of [C, C], in squares of sixteen, to rows of [C, padded].
inline void transpose_columns(const float* from, int64_t c, float* to, int64_t begin, int64_t end) {
  const int64_t padded = flywheel::padded(c);
  for (int64_t j = begin; j < end; j += kLanes)
    for (int64_t k = 0; k < c; k += kLanes) {
      Vf square[kLanes];
      for (int i = 0; i < kLanes; ++i)
        square[i] = k + i < c ? load_within(from + (k + i) * c + j, c - j, (c - k - i) * c - j, 0.f) : splat(0.f);
      transpose16(square);
      for (int i = 0; i < kLanes && j + i < end; ++i) store(to + (j + i) * padded + k, square[i]);
    }
}
}  // namespace
