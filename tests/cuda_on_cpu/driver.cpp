// Runs every kernel of csrc/cuda on the CPU against a float64 oracle. Buffers are of exact size, so that AddressSanitizer
// sees the first byte past them.
//   driver all | few | edges   value checks (the thread order: EMULATION_ORDER); the first failure ends a run with a fault
//   driver count               bytes, widths, exps, barriers and shuffles, as CSV
//   driver shared OP CLASSES   bytes of shared memory of each launch
#include "em_step.h"
#include "simt.cuh"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

using namespace flywheel;

namespace {
int64_t failed = 0, passed = 0;
constexpr double kInf = std::numeric_limits<double>::infinity();

template <class T>
struct Buffer {
  char* memory;
  T* p;
  size_t n;
  explicit Buffer(size_t count, size_t ahead = 0) : n(count) {  // `ahead` elements off a 16-byte boundary
    memory = static_cast<char*>(std::malloc((count + ahead) * sizeof(T) + 1));
    p = reinterpret_cast<T*>(memory) + ahead;
    std::memset(memory, 0xff, (count + ahead) * sizeof(T));
  }
  ~Buffer() { std::free(memory); }
  Buffer(const Buffer&) = delete;
  T& operator[](size_t i) { return p[i]; }
};

template <class T>
CudaFloat type_of() { return sizeof(T) == 4 ? CudaFloat::kFp32 : std::is_same_v<T, __half> ? CudaFloat::kFp16 : CudaFloat::kBf16; }
template <class T>
T from_float(float x) {
  if constexpr (sizeof(T) == 4) return x;
  else if constexpr (std::is_same_v<T, __half>) return __float2half(x);
  else return __float2bfloat16(x);
}

struct Case {
  int64_t n;
  int c;
  bool main, aux, joint;      // aux with statistics; without, q
  size_t ahead = 0;           // elements off a 16-byte boundary
  bool skewed = false, odd = false;
  int labels = 0;             // that occur, from the lowest; all of them at 0
};
const Case* running;
const char* type_name;

void check(const char* what, size_t at, double found, double wanted, double tolerance) {
  const bool good = std::isnan(wanted) ? std::isnan(found) : std::fabs(found - wanted) <= tolerance * (1 + std::fabs(wanted));
  (good ? passed : failed)++;
  if (!good && failed <= 20)
    std::printf("WRONG %s[%zu] = %g, not %g (N %ld, C %d, %s, main %d, aux %d, joint %d, ahead %zu)\n", what, at, found, wanted,
                long(running->n), running->c, type_name, running->main, running->aux, running->joint, running->ahead);
  if (!good && emulation::fault >= 0) std::exit(1);
}

template <class T>
void fill_logits(Buffer<T>& x, int64_t n, int c, bool odd, std::mt19937& random) {
  std::normal_distribution<float> normal(0, 3);
  for (size_t k = 0; k < x.n; ++k) x[k] = from_float<T>(normal(random));
  if (!odd || n < 8) return;
  const auto row = [&](int64_t i, auto value) {
    for (int k = 0; k < c; ++k) x[size_t(i * c + k)] = from_float<T>(value(k));
  };
  row(0, [](int) { return 200.f; });
  row(1, [](int k) { return k == 0 ? 300.f : -300.f; });
  row(2, [](int k) { return k == 1 ? -INFINITY : 1.f; });
  row(3, [](int) { return 60000.f; });
  row(4, [](int k) { return k == 0 ? INFINITY : 0.f; });
  row(5, [](int) { return -INFINITY; });
  row(6, [](int) { return -200.f; });
}
template <class T>
std::vector<double> softmax(Buffer<T>& x, int64_t i, int c) {
  std::vector<double> f(static_cast<size_t>(c));
  double top = -kInf, sum = 0;
  for (int k = 0; k < c; ++k) top = std::max(top, double(to_float(x[size_t(i * c + k)])));
  for (int k = 0; k < c; ++k) sum += f[size_t(k)] = std::exp(double(to_float(x[size_t(i * c + k)])) - top);
  for (double& v : f) v /= sum;
  return f;
}
// q and eps of one sample, from the method's formulas.
struct Target {
  std::vector<double> q, r;
  double eps;
};
Target target(const std::vector<double>& f, const Buffer<float>& t, int label, int c, double w, bool joint) {
  Target out{f, f, 0};
  double shown = 0, total = 0;
  for (int k = 0; k < c; ++k) shown += out.r[size_t(k)] = f[size_t(k)] * double(t.p[label * c + k]);
  out.eps = shown < 1e-12 ? 1e-12 : shown;
  for (double& v : out.r) v /= out.eps;
  for (int k = 0; k < c; ++k) {
    const double own = k == label ? w : 0;
    out.q[size_t(k)] = joint ? f[size_t(k)] * (own + (1 - w) * double(t.p[label * c + k])) : own + (1 - w) * out.r[size_t(k)];
    total += out.q[size_t(k)];
  }
  if (joint)
    for (double& v : out.q) v /= total < 1e-12 ? 1e-12 : total;
  return out;
}

struct Inputs {
  Buffer<int64_t> labels, starts;
  Buffer<int32_t> order;
  Buffer<float> t, align, eps, w;
  Inputs(const Case& a, std::mt19937& random)
      : labels(size_t(a.n)), starts(size_t(a.c) + 1), order(size_t(a.n)), t(size_t(a.c) * size_t(a.c)), align(size_t(a.c)), eps(size_t(a.n)), w(size_t(a.n)) {
    std::uniform_real_distribution<float> uniform(0.02f, 1);
    for (int64_t i = 0; i < a.n; ++i) {
      labels[size_t(i)] = int64_t(random() % unsigned(a.labels ? a.labels : a.c));
      if (a.skewed) labels[size_t(i)] = i % 5 ? a.c / 2 : labels[size_t(i)] % 3 % a.c;
      eps[size_t(i)] = uniform(random) / float(a.c);
      w[size_t(i)] = uniform(random);
    }
    for (int j = 0; j < a.c; ++j) {
      align[size_t(j)] = 0.5f + uniform(random);
      const auto share = [&](int k) { return float((7 * j + 13 * k) % 101 + 1) / (50 * float(a.c)); };
      for (int k = 0; k < a.c; ++k) t[size_t(j * a.c + k)] = j == k && a.c > 2 ? 0.f : share(k);
    }
    for (int64_t i = 0; i < a.n; ++i) order[size_t(i)] = int32_t(i);
    std::stable_sort(order.p, order.p + a.n, [&](int32_t x, int32_t y) { return labels[size_t(x)] < labels[size_t(y)]; });
    int64_t at = 0;
    for (int j = 0; j <= a.c; ++j) {
      while (at < a.n && labels[size_t(order[size_t(at)])] < j) ++at;
      starts[size_t(j)] = at;
    }
  }
};

template <class T>
void em_step_case(const Case& a, emulation::Counters* counted = nullptr) {
  running = &a;
  std::mt19937 random(unsigned(a.n * 1000 + a.c));
  const auto n = size_t(a.n), c = size_t(a.c);
  Inputs in(a, random);
  Buffer<T> main(n * c, a.ahead), aux(n * c, a.ahead);
  fill_logits(main, a.n, a.c, a.odd, random);
  fill_logits(aux, a.n, a.c, a.odd, random);
  const double gamma = 0.6;
  Buffer<float> w(n), prob(n), eps(n), q(n * c);
  Buffer<int64_t> resampled(n), suggested(n);
  Buffer<double> r_sum(c * c), q_sum(c * c), f_sum(c), clean_sum(1);
  constexpr double kBefore = 1;  // sums are added to
  std::fill_n(r_sum.p, c * c, kBefore);
  std::fill_n(q_sum.p, c * c, kBefore);
  std::fill_n(f_sum.p, c, kBefore);
  clean_sum[0] = kBefore;

  EmOperands o = {};
  o.n = a.n, o.c = a.c, o.joint = a.joint, o.labels = in.labels.p;
  if (a.main) o.main_logits = main.p, o.gamma = &gamma, o.main_eps = in.eps.p, o.clean_prob = w.p, o.clean_sum = clean_sum.p;
  const bool look = a.aux || !a.main;
  if (look) o.aux_logits = aux.p, o.clean_in = a.main ? nullptr : in.w.p, o.corruption_t = in.t.p;
  if (a.aux) {
    o.align = in.align.p, o.resampled = resampled.p, o.suggested = suggested.p, o.suggested_prob = prob.p, o.eps = eps.p;
    o.r_sum = r_sum.p, o.q_sum = q_sum.p, o.f_sum = f_sum.p;
    if (a.c > kLaneClasses) o.order = in.order.p, o.starts = in.starts.p;
  } else if (look) {
    o.q = q.p;
  }
  if (a.n == 0) return;  // the binding launches nothing
  Buffer<double> workspace(size_t(em_step_workspace(o)));
  emulation::counters = {};
  em_step_cuda(type_of<T>(), o, workspace.p, nullptr);
  if (counted) {
    *counted = emulation::counters;
    return;
  }
  check("exps", 0, double(emulation::counters.exps), double(n * c) * (a.main + look), 0);

  double clean = 0;
  std::vector<double> r_want(c * c), q_want(c * c), f_want(c);
  for (size_t i = 0; i < n; ++i) {
    const auto label = size_t(in.labels[i]);
    double wi = double(in.w[i]);
    if (a.main) {
      const auto g = softmax(main, int64_t(i), a.c);
      wi = gamma * g[label] / (gamma * g[label] + (1 - gamma) * double(in.eps[i]));
      check("clean_prob", i, double(w[i]), wi, 3e-6);
      clean += double(w[i]);
      wi = double(w[i]);
    }
    if (!look) continue;
    const auto f = softmax(aux, int64_t(i), a.c);
    const Target want = target(f, in.t, int(label), a.c, wi, a.joint);
    if (!a.aux) {
      for (size_t k = 0; k < c; ++k) check("q", i * c + k, double(q[i * c + k]), want.q[k], 3e-5);
      continue;
    }
    check("eps", i, double(eps[i]), want.eps, 3e-6);
    bool certain = true;
    double most = 0, most_f = 0;
    for (size_t k = 0; k < c; ++k) {
      certain = certain && std::isfinite(want.q[k]);
      most = std::max(most, want.q[k]);
      most_f = std::max(most_f, f[k] * double(in.align[k]));
      r_want[label * c + k] += (1 - wi) * want.r[k];
      q_want[label * c + k] += want.q[k];
      f_want[k] += f[k];
    }
    check("labels in range", i, resampled[i] >= 0 && resampled[i] < a.c && suggested[i] >= 0 && suggested[i] < a.c, 1, 0);
    check("suggested_prob", i, double(prob[i]), certain ? most : NAN, 3e-5);
    if (!certain) continue;
    check("suggested", i, want.q[size_t(suggested[i])], most, 3e-5);
    check("resampled", i, f[size_t(resampled[i])] * double(in.align[size_t(resampled[i])]), most_f, 3e-6);
  }
  if (a.main) check("clean_sum", 0, clean_sum[0], kBefore + clean, 1e-12);
  for (size_t k = 0; a.aux && k < c * c; ++k) {
    check("r_sum", k, r_sum[k] - kBefore, r_want[k], 1e-5);
    check("q_sum", k, q_sum[k] - kBefore, q_want[k], 1e-5);
  }
  for (size_t k = 0; a.aux && k < c; ++k) check("f_sum", k, f_sum[k] - kBefore, f_want[k], 1e-5);
}

template <class T>
void loss_case(const Case& a, int64_t views, float confidence, emulation::Counters* counted = nullptr) {
  running = &a;
  std::mt19937 random(unsigned(a.n * 1000 + a.c));
  const auto n = size_t(a.n), c = size_t(a.c);
  const size_t rows = n * size_t(views);
  const float delta = 1e-4f;
  Inputs in(a, random);
  Buffer<T> x(rows * c, a.ahead), teacher(n * c, a.ahead), gradient(rows * c);
  fill_logits(x, 0, a.c, false, random);
  fill_logits(teacher, a.n, a.c, false, random);
  Buffer<double> partial(n);
  Buffer<float> loss(1);
  LossOperands o = {a.n, views, a.c, a.joint, confidence, delta, x.p, in.labels.p, a.aux ? teacher.p : nullptr, in.w.p, in.t.p, gradient.p, partial.p, loss.p};
  emulation::counters = {};
  posterior_loss_cuda(type_of<T>(), o, nullptr);
  if (counted) {
    *counted = emulation::counters;
    return;
  }
  double total = 0;
  const double rounding = sizeof(T) == 4 ? 3e-6 : std::is_same_v<T, __half> ? 1e-3 : 5e-3;
  for (size_t row = 0; row < rows; ++row) {
    const size_t i = row % n, label = size_t(in.labels[i]);
    std::vector<double> q(c);
    if (a.aux) q = target(softmax(teacher, int64_t(i), a.c), in.t, int(label), a.c, double(in.w[i]), a.joint).q;
    else q[label] = 1;
    const auto g = softmax(x, int64_t(row), a.c);
    double shares = 0, slope = 0;
    for (size_t k = 0; k < c; ++k) {
      shares += q[k];
      slope += g[k] / (double(c) * (g[k] + double(delta)));
      total += -q[k] * std::log(g[k]) + double(confidence) / double(c) * std::log(g[k] + double(delta));
    }
    for (size_t k = 0; k < c; ++k) {
      const double d = g[k] * shares - q[k] + double(confidence) * g[k] * (1 / (double(c) * (g[k] + double(delta))) - slope);
      const double scaled = d / double(rows), found = double(to_float(gradient[row * c + k]));
      check("gradient", row * c + k, found * double(rows), scaled * double(rows), rounding * (1 + std::fabs(d)) + 6e-8 * double(rows) * (sizeof(T) == 2));
    }
  }
  check("loss", 0, double(loss[0]), total / double(rows), 1e-5);
}

template <class T>
void all_of(const char* name, bool few) {
  type_name = name;
  const std::vector<int> classes = few ? std::vector<int>{10, 33, 600, 2049} : std::vector<int>{1, 2, 10, 14, 32, 33, 50, 64, 100, 200, 264, 300, 520, 1000, 1030, 1200, 2048, 2049};
  for (int c : classes) {
    const std::vector<int64_t> sizes = few ? std::vector<int64_t>{c > 1000 ? 9 : c > 32 ? 70 : 300} : c > 2047 ? std::vector<int64_t>{9} : c > 1000 ? std::vector<int64_t>{1, 19} : c > 128 ? std::vector<int64_t>{17, 70} : std::vector<int64_t>{1, 127, 129, 300};
    for (int64_t n : sizes)
      for (bool joint : {false, true}) {
        const size_t ahead = n % 2 ? 1 : 0;
        for (int mode = 0; mode < 4; ++mode)  // q; main_estep; aux_estep; em_step
          if (mode == 3 || (!few && (mode == 2) == joint)) em_step_case<T>({n, c, bool(mode & 1), bool(mode & 2), joint, ahead});
        em_step_case<T>({n, c, true, true, joint, 0, true, !few});
        if (n > 130) continue;
        loss_case<T>({n, c, false, true, joint, ahead}, 2, 0.1f);
        if (!few) loss_case<T>({n, c, false, false, joint}, 1, joint ? 0.3f : 0.f);
      }
  }
  if (few) return;
  em_step_case<T>({70000, 2, true, true, false});  // more tiles than blocks
  em_step_case<T>({9000, 40, true, true, true});    // more than the fewest rows a team, labels over many teams
  em_step_case<T>({9000, 40, true, true, false, 0, true});
}

#ifdef FLYWHEEL_MAX_BLOCKS
template <class T>
void count_of(const char* name) {
  const auto print = [&](const char* op, const Case& a, const emulation::Counters& k, double floor, double elements) {
    std::printf("%s,%s,%d,%ld,%ld,%ld,%.4f,%.4f,%.4f,%.2f,%.2f\n", op, name, a.c, long(a.n), long(k.loaded), long(k.stored),
                double(k.loaded + k.stored) / floor, double(k.wide) / double(k.loaded), double(k.exps) / elements,
                double(k.barriers) / double(a.n), double(k.exchanges) / 32 / double(a.n));
    std::fflush(stdout);
  };
  // What each block does when kFullGrid rows are spread over all of them, on a grid of FLYWHEEL_MAX_BLOCKS: as many rows a
  // block, and a label's rows as many. A floor is every operand once: what each row has, and what the slice's labels have.
  constexpr int64_t kFullGrid = 2048 * 528, kBlocks = FLYWHEEL_MAX_BLOCKS;
  for (int c : {10, 14, 50, 100, 200, 1000}) {
    const int64_t n = kBlocks * (c > 256 ? 512 : 2048);
    const bool sorted = c > kLaneClasses;
    const int labels = sorted ? int((n * c + kFullGrid - 1) / kFullGrid) : c;
    const double logits = double(n) * c * sizeof(T), look = double(n) * (24 + 4 * sorted) + (4.0 + 32) * labels * c + 20.0 * c + 8.0 * sorted * (c + 1);
    emulation::Counters k;
    const auto count = [&](const char* op, bool main, bool aux, double floor) {
      const Case a = {n, c, main, aux, false, 0, false, false, labels};
      em_step_case<T>(a, &k);
      print(op, a, k, floor, double(n) * c * (main + aux));
    };
    count("main_estep", true, false, logits + double(n) * 16 + 16);
    count("aux_estep", false, true, logits + double(n) * 12 + look);
    count("em_step", true, true, 2 * logits + double(n) * 16 + 16 + look);
    const Case loss = {512, c, false, true, false};
    loss_case<T>(loss, 2, 0.1f, &k);
    print("posterior_loss", loss, k, 512.0 * c * (sizeof(T) * 5 + 4) + 512.0 * 12 + 4, 3 * 512.0 * c);
  }
}
#endif
}  // namespace

int main(int argc, char** argv) {
  const char* mode = argc > 1 ? argv[1] : "all";
  try {
    if (!std::strcmp(mode, "shared")) {
      emulation::Counters k;
      const Case one = {1, std::atoi(argv[3]), true, true, true};
      std::strcmp(argv[2], "em_step") ? loss_case<float>(one, 1, 0.1f, &k) : em_step_case<float>(one, &k);
      for (const size_t bytes : k.shared) std::printf("%zu\n", bytes);
      return 0;
    }
#ifdef FLYWHEEL_MAX_BLOCKS
    if (!std::strcmp(mode, "count")) {
      std::printf("op,dtype,classes,rows,bytes_loaded,bytes_stored,bytes_over_floor,loads_of_16_bytes,exps_an_element,barriers_a_row,warp_shuffles_a_row\n");
      count_of<float>("float32");
      count_of<__nv_bfloat16>("bfloat16");
      return 0;
    }
#endif
    const bool edges = !std::strcmp(mode, "edges"), few = !std::strcmp(mode, "few");
    if (!edges) all_of<float>("float32", few), all_of<__nv_bfloat16>("bfloat16", few);
    if (!edges && !few) all_of<__half>("float16", few);
    if (edges) {  // ragged and misaligned, on few rows
      type_name = "any";
      for (int64_t n : {1, 64, 129})  // the smallest first: each kernel's faults show there, as a rule
        for (int c : {2, 10, 14, 32, 50, 100, 300, 2049})
          for (size_t ahead : {0, 1}) {
            em_step_case<float>({n, c, true, true, true, ahead, n == 129, n == 64});
            em_step_case<float>({n, c, false, false, false, ahead});
            em_step_case<__nv_bfloat16>({n, c, true, false, false, ahead});
            loss_case<float>({n, c, false, true, false, ahead}, 2, 0.1f);
            loss_case<float>({n, c, false, false, false, ahead}, 1, 0.f);
          }
    }
  } catch (const std::exception& error) {
    std::printf("THROWN %s\n", error.what());
    ++failed;
  }
  std::printf("%ld passed, %ld failed\n", long(passed), long(failed));
  return failed != 0;
}
