// The expectation steps in one pass: every logit is read once and costs one exp. Three layouts by the number of classes.
// Statistics need no atomics, and are the same bits every time: a block (or, where rows come sorted by label, whoever
// owns a label's rows) adds in a fixed order, and the last kernel adds up what they left.
#include "em_step.h"
#include "team.cuh"

namespace flywheel {
namespace {
#ifndef FLYWHEEL_MAX_BLOCKS
#define FLYWHEEL_MAX_BLOCKS 528  // of a kernel that visits rows in turn: four for each of an H100's processors
#endif
constexpr int kMaxBlocks = FLYWHEEL_MAX_BLOCKS;
constexpr int kMaxTeamRows = 512;  // that are added in float32 before they join a float64 sum

__device__ __forceinline__ Prior prior_of(const EmOperands& a) { return prior(load_same(a.gamma)); }

__device__ __forceinline__ void write_aux(const EmOperands& a, int64_t i, Posterior<float> m, Best suggested, int resampled) {
  store(a.resampled + i, int64_t(resampled));
  store(a.suggested + i, int64_t(suggested.label));
  store(a.suggested_prob + i, suggested.value);
  store(a.eps + i, m.eps);
}

// ---- C <= 32: a thread a row. A block's rows are one contiguous range, copied together 16 bytes a thread.

// Copies of the [C, C] statistics in a block, so that its threads can add without waiting for each other.
__host__ __device__ __forceinline__ int copies_of(int c) {
  const int copies = least(kThreads / c, 1024 / (c * c));
  return copies > 1 ? copies : 1;
}
// r, q of joint, own, f, clean.
__host__ __device__ __forceinline__ int partial_width(int c, bool joint) { return c * c * (joint ? 2 : 1) + 2 * c + 1; }

struct RowTerms {
  float r, q, own, inverse;
  int label;
};

template <class T>
__device__ __forceinline__ void copy_rows(const T* x, int total, int c, float* tile) {
  constexpr int kVector = 16 / sizeof(T);
  const int stride = c | 1;  // odd, so that the banks differ
  // Elements before the first 16-byte boundary: at most kVector - 1, none where the tensor starts on one.
  const int ahead = int((16 - reinterpret_cast<uintptr_t>(x) % 16) % 16 / sizeof(T));
  const int head = least(ahead, total);
  const int body = (total - head) / kVector * kVector;
  for (int k = threadIdx.x; k < head; k += kThreads) tile[k / c * stride + k % c] = to_float(load(x + k));
  for (int k = head + int(threadIdx.x) * kVector; k < head + body; k += kThreads * kVector) {
    const uint4 raw = load(reinterpret_cast<const uint4*>(x + k));
    const T* value = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int j = 0; j < kVector; ++j) tile[(k + j) / c * stride + (k + j) % c] = to_float(value[j]);
  }
  for (int k = head + body + int(threadIdx.x); k < total; k += kThreads) tile[k / c * stride + k % c] = to_float(load(x + k));
}
// A row's softmax terms, in place; their sum.
__device__ __forceinline__ float terms_of(float* row, int c) {
  float top = row[0], sum = 0;
  for (int k = 1; k < c; ++k) top = fmaxf(top, row[k]);
  for (int k = 0; k < c; ++k) sum += row[k] = exp_of(row[k] - top);
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) thread_per_row(EmOperands a, double* partial) {
  FLYWHEEL_DYNAMIC_SHARED(double, clean);  // [kWarps]
  const int c = a.c, square = c * c, stride = c | 1, copies = copies_of(c);
  const bool sums = a.r_sum != nullptr;
  const int stats = sums ? copies * partial_width(c, a.joint) : 0;
  double* stat_r = clean + kWarps;
  double* stat_q = stat_r + copies * square;
  double* stat_own = a.joint ? stat_q + copies * square : stat_q;
  double* stat_f = stat_own + copies * c;
  float* t = reinterpret_cast<float*>(stat_r + stats);          // [C, C], where the auxiliary network is looked at
  float* align = t + square;                                    // [C], there too
  float* tile = a.aux_logits ? align + c : t;                   // [kThreads, stride]
  auto* terms = reinterpret_cast<RowTerms*>(tile + kThreads * stride);  // [kThreads], where sums are wanted
  for (int k = threadIdx.x; k < stats; k += kThreads) stat_r[k] = 0;
  if (a.aux_logits) {
    for (int k = threadIdx.x; k < square; k += kThreads) t[k] = load(a.corruption_t + k);
    for (int k = threadIdx.x; k < c; k += kThreads) align[k] = a.align ? load(a.align + k) : 1.f;
  }

  const Prior known = a.main_logits ? prior_of(a) : Prior{};
  double mine = 0;
  for (int64_t first = int64_t(blockIdx.x) * kThreads; a.n > first; first += int64_t(gridDim.x) * kThreads) {
    const int rows = int(least<int64_t>(a.n - first, kThreads));
    const int64_t i = first + threadIdx.x;
    const bool here = int(threadIdx.x) < rows;
    float* row = tile + int(threadIdx.x) * stride;
    const int label = here ? int(load(a.labels + i)) : 0;
    float w = 0;
    if (a.main_logits) {
      copy_rows(static_cast<const T*>(a.main_logits) + first * c, rows * c, c, tile);
      __syncthreads();
      if (here) {
        const float sum = terms_of(row, c);
        w = clean_prob(row[label], sum, known, load(a.main_eps + i));
        store(a.clean_prob + i, w);
        mine += w;
      }
      __syncthreads();  // the tile is free again
    } else if (here) {
      w = load(a.clean_in + i);
    }
    if (!a.aux_logits) continue;

    copy_rows(static_cast<const T*>(a.aux_logits) + first * c, rows * c, c, tile);
    __syncthreads();
    if (here) {
      SeenAux seen = {terms_of(row, c), row[label], 0.f, row[label] * t[label * c + label], {}, {}};
      for (int k = 0; k < c; ++k) {
        const float p = row[k] * t[label * c + k];
        seen.shown += p;
        seen.p = better(seen.p, {p, k});
        seen.f = better(seen.f, {row[k] * align[k], k});
      }
      Best suggested;
      const Posterior<float> m = conclude(a.joint, w, seen, label, &suggested);
      if (a.eps) write_aux(a, i, m, suggested, seen.f.label);
      if (a.q)
        for (int k = 0; k < c; ++k) store(a.q + i * c + k, m.q * (row[k] * t[label * c + k]) + (k == label ? m.own : 0.f));
      if (sums) terms[threadIdx.x] = {m.r, m.q, m.own, 1.f / seen.sum, label};
    }
    __syncthreads();
    if (sums) {  // thread (copy, k) adds class k of every copies-th row
      const int k = threadIdx.x % c, copy = int(threadIdx.x) / c;
      for (int j = copy; j < rows && copy < copies; j += copies) {
        const RowTerms m = terms[j];
        const float e = tile[j * stride + k], p = e * t[m.label * c + k];
        const int at = (copy * c + m.label) * c + k;
        stat_r[at] += m.r * p;
        if (a.joint) stat_q[at] += m.q * p;
        if (k == m.label) stat_own[copy * c + k] += m.own;
        stat_f[copy * c + k] += e * m.inverse;
      }
    }
    __syncthreads();  // the tile is free again
  }
  if (!partial) return;
  double* out = partial + int64_t(blockIdx.x) * (sums ? partial_width(c, a.joint) : 1);
  const int width = sums ? partial_width(c, a.joint) - 1 : 0;
  for (int k = threadIdx.x; k < width; k += kThreads) {
    // which of the parts k lies in: each holds `copies` of `size` numbers
    const int squares = a.joint ? 2 * square : square;
    const int size = k < squares ? square : c, past = k - squares;
    const int part = past >= 0 ? squares + past / c * c : k / square * square;
    double total = 0;
    for (int copy = 0; copy < copies; ++copy) total += stat_r[part * copies + copy * size + k - part];
    store(out + k, total);
  }
  mine = warp_sum(mine);
  if (threadIdx.x % kWarp == 0) clean[threadIdx.x / kWarp] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += clean[w];
    store(out + width, total);
  }
}

// A thread a number: the blocks' parts in a fixed order.
__global__ void __launch_bounds__(kThreads) add_blocks(EmOperands a, const double* partial, int blocks) {
  const int c = a.c, square = a.r_sum ? c * c : 0, line = a.r_sum ? c : 0;
  const int width = a.r_sum ? partial_width(c, a.joint) : 1;
  const int k = int(blockIdx.x) * kThreads + int(threadIdx.x);
  const auto total = [&](int at) {
    double sum = 0;
    for (int b = 0; b < blocks; ++b) sum += load(partial + int64_t(b) * width + at);
    return sum;
  };
  const int own = a.joint ? 2 * square : square;
  if (k < square) {
    const double r = total(k);
    add_to(a.r_sum + k, r);
    add_to(a.q_sum + k, (a.joint ? total(square + k) : r) + (k % (c + 1) == 0 ? total(own + k / c) : 0.0));
  } else if (k < square + line) {
    add_to(a.f_sum + k - square, total(own + line + k - square));
  } else if (k == square + line && a.clean_sum) {
    add_to(a.clean_sum, total(width - 1));
  }
}

// ---- 32 < C: a warp a row, or a block a row, and the row in registers. Each team takes a range of the rows as `order`
// has them; a label's statistics stay in registers while its rows last. Then they go straight to the result where all
// the label's rows are the team's, and to one of the team's two edges where they are not.

struct Ranges {
  int64_t rows, teams, blocks;  // rows of a team; how many teams; their blocks
};
__host__ __device__ __forceinline__ Ranges ranges_of(int64_t n, bool block) {
  const int64_t wanted = kMaxBlocks * (block ? 1 : kWarps);
  const int64_t even = (n + wanted - 1) / wanted, rows = least<int64_t>(even > 64 ? even : 64, kMaxTeamRows);
  const int64_t teams = (n + rows - 1) / rows;
  return {rows, teams, block ? teams : (teams + kWarps - 1) / kWarps};
}
// The workspace: [teams, 2 edges, r (and q of joint), C], own [teams, 2], f [blocks, C], clean [teams].
struct Workspace {
  double *edge, *own, *f, *clean;
};
__host__ __device__ __forceinline__ int64_t edge_width(const EmOperands& a) { return int64_t(a.c) * (a.joint ? 2 : 1); }
__host__ __device__ __forceinline__ Workspace cut(const EmOperands& a, double* at, const Ranges& ranges) {
  Workspace space = {at, at, at, at};
  if (a.r_sum) {
    space.own = space.edge + ranges.teams * 2 * edge_width(a);
    space.f = space.own + ranges.teams * 2;
    space.clean = space.f + ranges.blocks * a.c;
  }
  return space;
}

// Where a team's statistics of one label go.
struct Place {
  double *r, *q, *own;
  __device__ __forceinline__ Place(const EmOperands& a, const Workspace& space, int64_t team, int64_t begin, int64_t end, int label) {
    const int64_t from = load_same(a.starts + label), to = load_same(a.starts + label + 1);
    if (from >= begin && to <= end) {
      r = a.r_sum + int64_t(label) * a.c;
      q = a.q_sum + int64_t(label) * a.c;
      own = nullptr;
    } else {
      const int64_t edge = team * 2 + (from > begin ? 1 : 0);
      r = space.edge + edge * edge_width(a);
      q = a.joint ? r + a.c : nullptr;
      own = space.own + edge;
    }
  }
};

template <class T, int kValues, bool kBlock, bool kAligned>
__global__ void __launch_bounds__(kThreads, 3) team_per_row(EmOperands a, double* workspace) {
  FLYWHEEL_DYNAMIC_SHARED(Best, slots);
  constexpr int kVector = kAligned ? 16 / int(sizeof(T)) : 1;
  const Team<kBlock> team = {slots};
  const int c = a.c, rank = team.rank();
  const Ranges ranges = ranges_of(a.n, kBlock);
  const Workspace space = cut(a, workspace, ranges);
  const int64_t me = kBlock ? int64_t(blockIdx.x) : int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  // A block's last teams may be left without rows.
  const int64_t begin = me * ranges.rows, end = least(begin + ranges.rows, a.n);
  const auto at = [&](int v) { return (v / kVector * Team<kBlock>::kSize + rank) * kVector + v % kVector; };

  const auto read = [&](const void* logits, int64_t i, float* value) {
    const T* x = static_cast<const T*>(logits) + i * c;
    if constexpr (kAligned) {
#pragma unroll
      for (int v = 0; v < kValues; v += kVector) {
        uint4 raw = {};
        if (at(v) < c) raw = load(reinterpret_cast<const uint4*>(x + at(v)));
        const T* part = reinterpret_cast<const T*>(&raw);
#pragma unroll
        for (int j = 0; j < kVector; ++j) value[v + j] = at(v) < c ? to_float(part[j]) : -INFINITY;
      }
    } else {
#pragma unroll
      for (int v = 0; v < kValues; ++v) value[v] = at(v) < c ? to_float(load(x + at(v))) : -INFINITY;
    }
  };
  // Softmax terms in place; their sum, and the one of the label.
  const auto terms = [&](float* value, int label, float* e_own) {
    float top = value[0];
#pragma unroll
    for (int v = 1; v < kValues; ++v) top = fmaxf(top, value[v]);
    top = team.max(top);
    float sum = 0, own = 0;
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      value[v] = at(v) < c ? exp_of(value[v] - top) : 0.f;
      sum += value[v];
      if (at(v) == label) own = value[v];
    }
    *e_own = team.sum(own);
    return team.sum(sum);
  };

  float align[kValues];
#pragma unroll
  for (int v = 0; v < kValues; ++v) align[v] = a.align && at(v) < c ? load(a.align + at(v)) : 1.f;
  float t[kValues], r_sum[kValues], q_sum[kValues], f_sum[kValues], own_sum = 0;
#pragma unroll
  for (int v = 0; v < kValues; ++v) t[v] = r_sum[v] = q_sum[v] = f_sum[v] = 0;
  const Prior known = a.main_logits && !kBlock ? prior_of(a) : Prior{};  // a block, short of registers, reads it a row
  double clean = 0;
  int last = -1;
  const auto flush = [&]() {
    const Place to(a, space, me, begin, end, last);
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      if (at(v) < c) {
        const bool result = to.own == nullptr;
        const auto put_sum = [&](double* to_, double sum) { result ? add_to(to_, sum) : store(to_, sum); };
        put_sum(to.r + at(v), r_sum[v]);
        if (to.q) put_sum(to.q + at(v), double(a.joint ? q_sum[v] : r_sum[v]) + (result && at(v) == last ? double(own_sum) : 0.0));
      }
      r_sum[v] = q_sum[v] = 0;
    }
    if (to.own && rank == 0) store(to.own, double(own_sum));
    own_sum = 0;
  };

  for (int64_t position = begin; position < end; ++position) {
    const int64_t i = a.order ? int64_t(load_same(a.order + position)) : position;
    const int label = int(load_same(a.labels + i));
    float value[kValues], e_own;
    float w;
    if (a.main_logits) {
      read(a.main_logits, i, value);
      const float sum = terms(value, label, &e_own);
      w = clean_prob(e_own, sum, kBlock ? prior_of(a) : known, load_same(a.main_eps + i));
      if (rank == 0) {
        store(a.clean_prob + i, w);
        clean += w;
      }
    } else {
      w = load_same(a.clean_in + i);
    }
    if (!a.aux_logits) continue;

    if (label != last) {
      if (a.r_sum && last >= 0) flush();
      last = label;
#pragma unroll
      for (int v = 0; v < kValues; ++v) t[v] = at(v) < c ? load(a.corruption_t + int64_t(label) * c + at(v)) : 0.f;
    }
    read(a.aux_logits, i, value);
    SeenAux seen = {};
    seen.sum = terms(value, label, &seen.e_own);
    float p_own = 0;
#pragma unroll
    for (int v = 0; v != kValues; ++v) {
      if (at(v) >= c) continue;
      const float p = value[v] * t[v];
      seen.shown += p;
      if (at(v) == label) p_own = p;
      seen.p = better(seen.p, {p, at(v)});
      seen.f = better(seen.f, {value[v] * align[v], at(v)});
    }
    seen.shown = team.sum(seen.shown);
    seen.p_own = team.sum(p_own);
    seen.p = team.best(seen.p);
    seen.f = team.best(seen.f);
    Best suggested;
    const Posterior<float> m = conclude(a.joint, w, seen, label, &suggested);
    if (a.eps && rank == 0) write_aux(a, i, m, suggested, seen.f.label);
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      const float p = value[v] * t[v];
      if (a.q && at(v) < c) store(a.q + i * c + at(v), m.q * p + (at(v) == label ? m.own : 0.f));
      r_sum[v] += m.r * p;
      q_sum[v] += m.q * p;
      f_sum[v] += value[v] / seen.sum;
    }
    own_sum += m.own;
  }
  if (a.clean_sum && rank == 0 && begin < end) store(space.clean + me, clean);
  if (!a.r_sum) return;
  if (last >= 0) flush();
  if constexpr (kBlock) {
#pragma unroll
    for (int v = 0; v != kValues; ++v)
      if (at(v) < c) store(space.f + me * c + at(v), double(f_sum[v]));
  } else {
    float* f = reinterpret_cast<float*>(slots);  // [kWarps, C]
#pragma unroll
    for (int v = 0; v != kValues; ++v)
      if (at(v) < c) f[int(threadIdx.x) / kWarp * c + at(v)] = f_sum[v];
    __syncthreads();
    for (int k = threadIdx.x; k < c; k += kThreads) {
      double sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += f[w * c + k];
      store(space.f + int64_t(blockIdx.x) * c + k, sum);
    }
  }
}

// ---- C > 2048: a block a row, its terms in shared memory; a label's statistics are added where they belong, in float64.
template <class T>
__global__ void __launch_bounds__(kThreads) block_per_row(EmOperands a, double* workspace) {
  FLYWHEEL_DYNAMIC_SHARED(float, e);  // [C]
  const int c = a.c;
  const Team<true> team = {reinterpret_cast<Best*>(e + c + c % 2)};
  const Ranges ranges = ranges_of(a.n, true);
  const Workspace space = cut(a, workspace, ranges);
  const int64_t me = blockIdx.x, begin = me * ranges.rows, end = least(begin + ranges.rows, a.n);
  // A thread meets the same classes everywhere, so that only reductions and e[label] need a barrier.
  const auto terms = [&](const void* logits, int64_t i) {
    const T* x = static_cast<const T*>(logits) + i * c;
    float top = -INFINITY, sum = 0;
    for (int k = threadIdx.x; k < c; k += kThreads) top = fmaxf(top, e[k] = to_float(load(x + k)));
    top = team.max(top);
    for (int k = threadIdx.x; k < c; k += kThreads) sum += e[k] = exp_of(e[k] - top);
    return team.sum(sum);  // its barriers show e to all
  };
  double clean = 0;
  int last = -1;
  for (int64_t position = begin; position < end; ++position) {
    const int64_t i = a.order ? int64_t(load_same(a.order + position)) : position;
    const int label = int(load_same(a.labels + i));
    float w;
    if (a.main_logits) {
      const float sum = terms(a.main_logits, i);
      w = clean_prob(e[label], sum, prior_of(a), load_same(a.main_eps + i));
      __syncthreads();  // e is free again
      if (threadIdx.x == 0) {
        store(a.clean_prob + i, w);
        clean += w;
      }
    } else {
      w = load_same(a.clean_in + i);
    }
    if (!a.aux_logits) continue;

    const float* t = a.corruption_t + int64_t(label) * c;
    SeenAux seen = {};
    seen.sum = terms(a.aux_logits, i);
    seen.e_own = e[label];
    seen.p_own = seen.e_own * load_same(t + label);
    for (int k = threadIdx.x; k < c; k += kThreads) {
      const float p = e[k] * load(t + k);
      seen.shown += p;
      seen.p = better(seen.p, {p, k});
      seen.f = better(seen.f, {a.align ? e[k] * load(a.align + k) : e[k], k});
    }
    seen.shown = team.sum(seen.shown);
    seen.p = team.best(seen.p);
    seen.f = team.best(seen.f);
    Best suggested;
    const Posterior<float> m = conclude(a.joint, w, seen, label, &suggested);
    if (a.eps && threadIdx.x == 0) write_aux(a, i, m, suggested, seen.f.label);
    for (int k = threadIdx.x; a.q && k < c; k += kThreads)
      store(a.q + i * c + k, m.q * (e[k] * load(t + k)) + (k == label ? m.own : 0.f));
    if (a.r_sum) {
      const Place to(a, space, me, begin, end, label);
      const bool result = to.own == nullptr, first = label != last && !result;  // a team's own sums begin with their first term
      const auto add = [](double* sum, double term, bool fresh) { fresh ? store(sum, term) : add_to(sum, term); };
      for (int k = threadIdx.x; k < c; k += kThreads) {
        const float p = e[k] * load(t + k);
        add(to.r + k, m.r * p, first);
        if (to.q) add(to.q + k, double(m.q * p) + (result && k == label ? double(m.own) : 0.0), first);
        add(space.f + me * c + k, e[k] / seen.sum, last < 0);
      }
      if (!result && threadIdx.x == 0) add(to.own, m.own, first);
      last = label;
    }
  }
  if (a.clean_sum && threadIdx.x == 0) store(space.clean + me, clean);
}

// A block a label, one more for f, one more for clean: adds up the edges of labels whose rows several teams had.
__global__ void __launch_bounds__(kThreads) add_edges(EmOperands a, double* workspace, Ranges ranges) {
  const Workspace space = cut(a, workspace, ranges);
  const int c = a.c, label = blockIdx.x;
  if (!a.r_sum || label == c + 1) {
    double clean = 0;
    if (threadIdx.x != 0 || !a.clean_sum) return;
    for (int64_t team = 0; team < ranges.teams; ++team) clean += load(space.clean + team);
    return add_to(a.clean_sum, clean);
  }
  if (label == c) {
    for (int k = threadIdx.x; k < c; k += kThreads) {
      double sum = 0;
      for (int64_t block = 0; block < ranges.blocks; ++block) sum += load(space.f + block * c + k);
      add_to(a.f_sum + k, sum);
    }
    return;
  }
  const int64_t from = load_same(a.starts + label), to = load_same(a.starts + label + 1);
  const int64_t first = from / ranges.rows, last = (to - 1) / ranges.rows;
  if (from == to || first == last) return;  // written already
  for (int k = threadIdx.x; k < c; k += kThreads) {
    double r = 0, q = 0;
    for (int64_t team = first; team <= last; ++team) {
      const int64_t edge = team * 2 + (from > team * ranges.rows ? 1 : 0);
      const double part = load(space.edge + edge * edge_width(a) + k);
      r += part;
      q += a.joint ? load(space.edge + edge * edge_width(a) + c + k) : part;
      if (k == label) q += load(space.own + edge);
    }
    add_to(a.r_sum + int64_t(label) * c + k, r);
    add_to(a.q_sum + int64_t(label) * c + k, q);
  }
}

template <class T>
bool aligned(const EmOperands& a) {
  const auto on_16 = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return a.c * sizeof(T) % 16 == 0 && on_16(a.main_logits) && on_16(a.aux_logits);
}
unsigned lane_blocks(int64_t n) {
  return unsigned(least<int64_t>((n + kThreads - 1) / kThreads, kMaxBlocks));
}

template <class T>
void em_step_of(const EmOperands& a, double* workspace, Stream stream) {
  if (a.c <= kLaneClasses) {
    const unsigned blocks = lane_blocks(a.n);
    const size_t tables = size_t(a.c) * size_t(a.c + 1), stats = a.r_sum ? size_t(copies_of(a.c) * partial_width(a.c, a.joint)) : 0;
    const size_t shared = sizeof(double) * (stats + kWarps) + sizeof(float) * ((a.aux_logits ? tables : 0) + size_t(kThreads) * size_t(a.c | 1)) +
                          (a.r_sum ? sizeof(RowTerms) * kThreads : 0);
    double* partial = a.r_sum || a.clean_sum ? workspace : nullptr;
    launch(thread_per_row<T>, blocks, kThreads, shared, stream, a, partial);
    const int results = (a.r_sum ? a.c * a.c + a.c : 0) + 1;
    if (partial) launch(add_blocks, unsigned((results + kThreads - 1) / kThreads), kThreads, 0, stream, a, partial, int(blocks));
    return;
  }
  const bool block = whole_block(a.c);
  const Ranges ranges = ranges_of(a.n, block);
  const auto blocks = unsigned(ranges.blocks);
  const size_t shared = block ? sizeof(Best) * kWarps : a.r_sum ? sizeof(float) * size_t(kWarps * a.c) : 0;
  const auto run = [&](auto kernel, auto odd_kernel) {
    aligned<T>(a) ? launch(kernel, blocks, kThreads, shared, stream, a, workspace)
                  : launch(odd_kernel, blocks, kThreads, shared, stream, a, workspace);
  };
  if (a.c <= 256) run(team_per_row<T, 8, false, true>, team_per_row<T, 8, false, false>);
  else if (a.c <= 1024) run(team_per_row<T, 8, true, true>, team_per_row<T, 8, true, false>);
  else if (a.c <= 2048) run(team_per_row<T, 16, true, true>, team_per_row<T, 16, true, false>);
  else launch(block_per_row<T>, blocks, kThreads, sizeof(float) * size_t(a.c + a.c % 2) + sizeof(Best) * kWarps, stream, a, workspace);
  if (a.r_sum || a.clean_sum) launch(add_edges, a.r_sum ? unsigned(a.c + 2) : 1u, kThreads, 0, stream, a, workspace, ranges);
}
}  // namespace

int64_t em_step_workspace(const EmOperands& a) {
  if (a.c <= kLaneClasses) return int64_t(lane_blocks(a.n)) * (a.r_sum ? partial_width(a.c, a.joint) : 1);
  const Ranges ranges = ranges_of(a.n, whole_block(a.c));
  return ranges.teams + (a.r_sum ? ranges.teams * (2 * edge_width(a) + 2) + ranges.blocks * a.c : 0);
}

void em_step_cuda(CudaFloat type, const EmOperands& a, double* workspace, void* stream) {
  const auto s = static_cast<Stream>(stream);
  switch (type) {
    case CudaFloat::kFp32: return em_step_of<float>(a, workspace, s);
    case CudaFloat::kBf16: return em_step_of<__nv_bfloat16>(a, workspace, s);
    case CudaFloat::kFp16: return em_step_of<__half>(a, workspace, s);
  }
}
}  // namespace flywheel
