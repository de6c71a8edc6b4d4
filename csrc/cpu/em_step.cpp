// main_estep, aux_estep, em_step and posterior on the CPU: one kernel with parts left out. Rows are cut into parts by
// shape alone and the parts' sums are added in order, so any number of threads gives the same bits.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "../check.h"
#include "kernels.h"
#include "operands.h"

namespace flywheel {
namespace {
// Up to so many classes every part keeps its own [C, C] statistics; above, rows are visited in the order of their labels,
// so that a label's statistics and its row of the corruption matrix stay in the cache while they are needed.
constexpr int64_t kUnsortedClasses = 256;
constexpr int64_t kMaxParts = 16;          // with statistics of their own
constexpr int64_t kSortedRows = 1024;      // a part, where rows are sorted
constexpr int64_t kPartElements = 1 << 14; // a part, without statistics

struct Sums {
  double *r, *q, *f;  // [C, C] row observed label, the same, [C]
};

std::vector<int32_t> sorted_by_label(const int64_t* labels, int64_t n, int64_t c, std::vector<int64_t>& starts, const char* op) {
  starts.assign(size_t(c) + 1, 0);
  for (int64_t i = 0; i < n; ++i) {
    check_label(op, labels, i, c);
    ++starts[size_t(labels[i]) + 1];
  }
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  std::vector<int32_t> order(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) order[size_t(next[size_t(labels[i])]++)] = int32_t(i);
  return order;
}

// Memory of one part; uninitialised where the kernel writes first.
struct Part : EmPart {
  std::unique_ptr<float[]> floats;
  std::vector<double> doubles;
  std::vector<int32_t> counts;

  void reserve(const EmStep& s, bool with_sums, bool sorted) {
    const int64_t p = padded(s.c), labels = sorted ? 1 : s.c, squares = with_sums ? labels * p * (s.joint ? 2 : 1) : 0;
    const int64_t classes = s.c <= kLaneClasses ? s.c * kGroup : p;
    const int64_t group = s.aux_logits ? kGroup * p : 0, rest = squares + (with_sums ? s.c + classes : 0);
    floats.reset(new float[size_t(group + rest)]);
    std::fill_n(floats.get() + group, rest, 0.f);
    e = floats.get();
    sums = with_sums;
    if (!with_sums) return;
    stride = sorted ? 0 : p;
    r32 = e + group;
    q32 = s.joint ? r32 + labels * p : r32;
    own32 = r32 + squares;
    f32 = own32 + s.c;
    counts.assign(size_t(s.c), 0);
    count = counts.data();
    doubles.assign(size_t(s.c + (sorted ? 4 * s.c : s.joint ? 2 * s.c * s.c : s.c * s.c + s.c)), 0.0);
    f = doubles.data();
    if (sorted) {
      edge = f + s.c;
      return;
    }
    r = f + s.c;
    (s.joint ? q : own) = r + s.c * s.c;
  }
};

// Runs the kernel over all rows; the sum of clean_prob, and the statistics where `sums` is given.
double run(const char* op, Float type, EmStep& s, const Sums* sums) {
  const bool sorted = sums && s.c > kUnsortedClasses;
  std::vector<int64_t> starts;
  std::vector<int32_t> order;
  if (sorted) {
    order = sorted_by_label(s.labels, s.n, s.c, starts, op);
    s.order = order.data();
  }
  int64_t rows = kPartElements / s.c;
  if (sums) {
    const int64_t least = 32 * s.c > 1024 ? 32 * s.c : 1024, even = (s.n + kMaxParts - 1) / kMaxParts;
    rows = sorted ? kSortedRows : even > least ? even : least;
  }
  rows = (rows + kGroup - 1) / kGroup * kGroup;
  if (rows < kGroup) rows = kGroup;
  const int64_t count = (s.n + rows - 1) / rows;
  std::vector<Part> parts(static_cast<size_t>(count));
  in_parallel(count, [&](int64_t b) {
    Part& part = parts[size_t(b)];
    const int64_t begin = b * rows, end = begin + rows < s.n ? begin + rows : s.n;
    part.reserve(s, sums != nullptr, sorted);
    if (sorted) {
      part.r = sums->r;
      part.q = sums->q;
      const int64_t first = s.labels[order[size_t(begin)]], last = s.labels[order[size_t(end - 1)]];
      if (starts[size_t(first)] < begin || starts[size_t(first) + 1] > end) part.edge_label[0] = first;
      if (starts[size_t(last) + 1] > end && last != first) part.edge_label[1] = last;
    }
    kernels().em_step(type, s, part, begin, end);
    part.floats.reset();
  });
  double clean = 0;
  for (const Part& part : parts) {
    if (part.bad >= 0) check_label(op, s.labels, part.bad, s.c);
    clean += part.clean;
    if (!sums) continue;
    for (int64_t k = 0; k < s.c; ++k) sums->f[k] += part.f[k];
    for (int64_t k = 0; !sorted && k < s.c * s.c; ++k) sums->r[k] += part.r[k], sums->q[k] += (s.joint ? part.q : part.r)[k];
    for (int64_t k = 0; part.own && k < s.c; ++k) sums->q[k * (s.c + 1)] += part.own[k];
    for (int side = 0; sorted && side < 2; ++side)
      for (int64_t k = 0; part.edge_label[side] >= 0 && k < s.c; ++k) {
        sums->r[part.edge_label[side] * s.c + k] += part.edge[side * 2 * s.c + k];
        sums->q[part.edge_label[side] * s.c + k] += part.edge[(side * 2 + 1) * s.c + k];
      }
  }
  return clean;
}

// The outputs of the auxiliary step: per sample they are overwritten, the sums are added to.
struct AuxOut {
  Tensor resampled, suggested, suggested_prob, eps, r, q, f;
  Sums into(const char* op, EmStep& s, const Tensor& logits) {
    check_aux_out(op, logits, resampled, suggested, suggested_prob, eps, r, q, f);
    s.resampled = resampled.mutable_data_ptr<int64_t>();
    s.suggested = suggested.mutable_data_ptr<int64_t>();
    s.suggested_prob = suggested_prob.mutable_data_ptr<float>();
    s.eps = eps.mutable_data_ptr<float>();
    return {r.mutable_data_ptr<double>(), q.mutable_data_ptr<double>(), f.mutable_data_ptr<double>()};
  }
};

void main_estep(const Tensor& logits, const Tensor& labels, const Tensor& gamma, const Tensor& eps, Tensor clean_prob, Tensor clean_sum) {
  check_main("main_estep", logits, labels, gamma, eps, clean_prob, clean_sum);
  EmStep s = {logits.size(0), logits.size(1), labels.const_data_ptr<int64_t>()};
  with_main(s, logits, gamma, eps, clean_prob);
  *clean_sum.mutable_data_ptr<double>() += run("main_estep", float_type(logits), s, nullptr);
}

void aux_estep(const Tensor& logits, const Tensor& labels, const Tensor& clean_prob, const Tensor& corruption_t, const Tensor& align, bool joint,
               std::optional<Tensor>, std::optional<Tensor>, Tensor resampled, Tensor suggested, Tensor suggested_prob, Tensor eps, Tensor r,
               Tensor q, Tensor f) {
  check_aux("aux_estep", logits, labels, clean_prob, corruption_t, &align);
  EmStep s = {logits.size(0), logits.size(1), labels.const_data_ptr<int64_t>()};
  s.clean_in = clean_prob.const_data_ptr<float>();
  const AuxTables tables(s, logits, corruption_t, &align, joint);
  const Sums sums = AuxOut{resampled, suggested, suggested_prob, eps, r, q, f}.into("aux_estep", s, logits);
  run("aux_estep", float_type(logits), s, &sums);
}

void em_step(const Tensor& main_logits, const Tensor& aux_logits, const Tensor& labels, const Tensor& gamma, const Tensor& eps,
             const Tensor& corruption_t, const Tensor& align, bool joint, std::optional<Tensor>, std::optional<Tensor>, Tensor clean_prob,
             Tensor clean_sum, Tensor resampled, Tensor suggested, Tensor suggested_prob, Tensor eps_out, Tensor r, Tensor q, Tensor f) {
  check_em_step(main_logits, aux_logits, labels, gamma, eps, corruption_t, align, clean_prob, clean_sum);
  EmStep s = {main_logits.size(0), main_logits.size(1), labels.const_data_ptr<int64_t>()};
  with_main(s, main_logits, gamma, eps, clean_prob);
  const AuxTables tables(s, aux_logits, corruption_t, &align, joint);
  const Sums sums = AuxOut{resampled, suggested, suggested_prob, eps_out, r, q, f}.into("em_step", s, main_logits);
  *clean_sum.mutable_data_ptr<double>() += run("em_step", float_type(main_logits), s, &sums);
}

Tensor posterior_q(const Tensor& logits, const Tensor& labels, const Tensor& clean_prob, const Tensor& corruption_t, bool joint) {
  check_aux("posterior", logits, labels, clean_prob, corruption_t, nullptr);
  EmStep s = {logits.size(0), logits.size(1), labels.const_data_ptr<int64_t>()};
  s.clean_in = clean_prob.const_data_ptr<float>();
  const AuxTables tables(s, logits, corruption_t, nullptr, joint);
  Tensor q = torch::stable::new_empty(clean_prob, {s.n, s.c});
  s.q = q.mutable_data_ptr<float>();
  run("posterior", float_type(logits), s, nullptr);
  return q;
}

STABLE_TORCH_LIBRARY_IMPL(flywheel_fast, CPU, m) {
  m.impl("main_estep", TORCH_BOX(&main_estep));
  m.impl("aux_estep", TORCH_BOX(&aux_estep));
  m.impl("em_step", TORCH_BOX(&em_step));
  m.impl("posterior", TORCH_BOX(&posterior_q));
}
}  // namespace
}  // namespace flywheel
