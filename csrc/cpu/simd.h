// Sixteen floats at a time, in the compiler's vector extensions: one source for every instruction set.
// Everything is static or in an unnamed namespace: a copy compiled for AVX-512 must never serve an older processor.
#pragma once
#include <cstdint>
#include <cstring>

namespace {
constexpr int kLanes = 16;
typedef float Vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t Vi __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Vh __attribute__((vector_size(2 * kLanes)));
typedef uint32_t Vu __attribute__((vector_size(4 * kLanes)));
typedef float Vf8 __attribute__((vector_size(32)));   // halves, of what is twice as wide in 64 bits
typedef int32_t Vi8 __attribute__((vector_size(32)));
typedef double Vd8 __attribute__((vector_size(64)));
typedef int64_t Vl8 __attribute__((vector_size(64)));

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

const Vi kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
inline Vf splat(float x) { return x - Vf{}; }
inline Vi splat(int32_t x) { return x - Vi{}; }
inline Vf max(Vf a, Vf b) { return a < b ? b : a; }

// exp(x) for x <= 0, relative error below 2.5e-7 (measured over all floats); 0 below -87.3; a NaN stays one.
inline Vf exp_nonpositive(Vf x) {
  const Vf low = splat(-87.3f);
  const Vi alive = ~(x < low);
  x = max(x, low);
  const Vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest integer, which the low bits then hold
  const Vf shifted = x * 1.44269504f + magic, n = shifted - magic;
  Vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vf p = splat(8.3125021e-3f);
  p = p * r + 4.1890333e-2f;
  p = p * r + 1.66671154e-1f;
  p = p * r + 4.99992303e-1f;
  p = p * (r * r) + (r + 1.f);
  return alive ? (Vf)((Vi)p + ((Vi)shifted << 23)) : splat(0.f);
}

// log(x) for normal positive x, error below 2e-7 of max(1, |log x|) (measured); a NaN stays one.
inline Vf log_positive(Vf x) {
  const Vi bits = (Vi)x;
  const Vi shifted = bits - 0x3f3504f3;  // mantissa in [sqrt(1/2), sqrt(2))
  const Vf n = __builtin_convertvector(shifted >> 23, Vf);
  const Vf m = (Vf)(bits - (shifted & (int32_t)0xff800000)) - 1.f;
  Vf p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const Vf square = m * m;
  const Vf y = p * m * square - n * 2.12194440e-4f - 0.5f * square + m + n * 0.693359375f;
  return x == x ? y : x;
}

inline Vf load(const float* p) { Vf v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, Vf v) { std::memcpy(p, &v, sizeof v); }
inline void store(int64_t* p, Vi v) {
  Vi8 half[2];
  std::memcpy(half, &v, sizeof v);
  for (int h = 0; h < 2; ++h) {
    const Vl8 wide = __builtin_convertvector(half[h], Vl8);
    std::memcpy(p + 8 * h, &wide, sizeof wide);
  }
}
// Sixteen labels; whether all of them are in 0..c-1.
inline bool load_labels(const int64_t* p, int64_t c, Vi& labels) {
  Vl8 wide[2];
  std::memcpy(wide, p, sizeof wide);
  const Vl8 bad = (wide[0] < 0) | (wide[0] >= c) | (wide[1] < 0) | (wide[1] >= c);
  const Vi8 half[2] = {__builtin_convertvector(wide[0], Vi8), __builtin_convertvector(wide[1], Vi8)};
  std::memcpy(&labels, half, sizeof labels);
  int64_t any = 0;
  for (int l = 0; l < 8; ++l) any |= bad[l];
  return any == 0;
}
inline void add_to(Vd8& sum, Vf v) {
  Vf8 half[2];
  std::memcpy(half, &v, sizeof v);
  sum += __builtin_convertvector(half[0], Vd8) + __builtin_convertvector(half[1], Vd8);
}
inline Vf widen(Vh h, bf16) { return (Vf)(__builtin_convertvector(h, Vu) << 16); }
// float16 by integer arithmetic: the exponent is moved from bias 15 to 127, subnormals by a multiplication.
inline Vf widen(Vh h, fp16) {
  const Vu x = __builtin_convertvector(h, Vu);
  Vu b = (Vu)((Vf)((x & 0x7fffu) << 13) * 5.192296858534828e33f);  // 2^112
  b |= (Vu)((x & 0x7c00u) == 0x7c00u) & 0x7f800000u;                 // infinity or NaN
  return (Vf)(b | (x & 0x8000u) << 16);
}
template <class T>
inline Vf load(const T* p) { Vh h; std::memcpy(&h, p, sizeof h); return widen(h, T{}); }
// `count` < 16 elements, then `rest`; reads no further.
template <class T>
inline Vf load_some(const T* p, int count, float rest) {
  T few[kLanes] = {};
  for (int k = 0; k < count; ++k) few[k] = p[k];  // a memcpy of unknown size would be a call
  return kLane < count ? load(few) : splat(rest);
}
template <class T>
inline float to_float(T x) { return load_some(&x, 1, 0.f)[0]; }
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { const uint32_t b = uint32_t(x.bits) << 16; float f; std::memcpy(&f, &b, 4); return f; }

inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) {  // to the nearest, ties to even
  uint32_t b;
  std::memcpy(&b, &x, 4);
  p->bits = x == x ? uint16_t((b + 0x7fffu + (b >> 16 & 1u)) >> 16) : uint16_t(0x7fc0u);
}
inline void put(fp16* p, float x) {
  uint32_t b;
  std::memcpy(&b, &x, 4);
  const uint32_t sign = b >> 16 & 0x8000u;
  b &= 0x7fffffffu;
  if (b > 0x7f800000u) p->bits = uint16_t(sign | 0x7e00u);
  else if (b >= 0x477ff000u) p->bits = uint16_t(sign | 0x7c00u);
  else if (b >= 0x38800000u) p->bits = uint16_t(sign | (b + 0xfffu + (b >> 13 & 1u) - 0x38000000u) >> 13);
  else {  // subnormal: adding 1/2 rounds to multiples of 2^-24
    float f;
    std::memcpy(&f, &b, 4);
    f += 0.5f;
    std::memcpy(&b, &f, 4);
    p->bits = uint16_t(sign | (b - 0x3f000000u));
  }
}

// Lane l of the result: element index[l] of the table of 16, or of 32.
#ifdef __clang__
inline Vf pick(Vf table, Vi index) { Vf v; for (int l = 0; l < kLanes; ++l) v[l] = table[index[l]]; return v; }
inline Vf pick(Vf low, Vf high, Vi index) { return index < kLanes ? pick(low, index & 15) : pick(high, index & 15); }
#else
inline Vf pick(Vf table, Vi index) { return __builtin_shuffle(table, index); }
inline Vf pick(Vf low, Vf high, Vi index) { return __builtin_shuffle(low, high, index); }
#endif

template <int kStep>
inline void exchange(Vf& a, Vf& b) {
  Vi low, high;
  for (int l = 0; l < kLanes; ++l) {
    low[l] = l & kStep ? kLanes + l - kStep : l;
    high[l] = l & kStep ? kLanes + l : l + kStep;
  }
#ifdef __clang__
  Vf x, y;
  for (int l = 0; l < kLanes; ++l) {
    x[l] = l & kStep ? b[l - kStep] : a[l];
    y[l] = l & kStep ? b[l] : a[l + kStep];
  }
#else
  const Vf x = __builtin_shuffle(a, b, low), y = __builtin_shuffle(a, b, high);
#endif
  a = x;
  b = y;
}
template <int kStep>
inline void exchange_all(Vf* v) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & kStep)) exchange<kStep>(v[i], v[i + kStep]);
}
// v[i][j] <-> v[j][i]
inline void transpose16(Vf* v) {
  Vf w[kLanes];
  for (int i = 0; i < kLanes; ++i) w[i] = v[i];
  exchange_all<8>(w);
  exchange_all<4>(w);
  exchange_all<2>(w);
  exchange_all<1>(w);
  for (int i = 0; i < kLanes; ++i) v[i] = w[i];
}
// Lane i of the result: the sum, or the maximum, over v[i].
inline Vf sums_of(Vf* v) {
  transpose16(v);
  Vf s = v[0];
  for (int i = 1; i < kLanes; ++i) s += v[i];
  return s;
}
inline Vf maxima_of(Vf* v) {
  transpose16(v);
  Vf m = v[0];
  for (int i = 1; i < kLanes; ++i) m = max(m, v[i]);
  return m;
}
}  // namespace
