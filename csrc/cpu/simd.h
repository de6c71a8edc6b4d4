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

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

inline Vf splat(float x) { return x - Vf{}; }
inline Vf max(Vf a, Vf b) { return a < b ? b : a; }

// exp(x) for x <= 0, relative error below 2e-7 (measured over all floats); 0 below -87.3; a NaN stays one.
inline Vf exp_nonpositive(Vf x) {
  const Vf low = splat(-87.3f);
  const Vi alive = ~(x < low);
  x = x < low ? low : x;
  const Vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vf n = (x * 1.44269504f + magic) - magic;
  Vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const Vi scale = (__builtin_convertvector(n, Vi) + 127) << 23;
  return (Vf)((Vi)(p * (Vf)scale) & alive);
}

inline Vf load(const float* p) { Vf v; std::memcpy(&v, p, sizeof v); return v; }
inline Vf load(const bf16* p) {
  Vh h;
  std::memcpy(&h, p, sizeof h);
  return (Vf)(__builtin_convertvector(h, Vu) << 16);
}
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { const uint32_t b = uint32_t(x.bits) << 16; float f; std::memcpy(&f, &b, 4); return f; }
// float16 by integer arithmetic: the exponent is moved from bias 15 to 127, subnormals by a multiplication.
inline float to_float(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = uint32_t(x.bits & 0x7fffu) << 13;
  float f;
  std::memcpy(&f, &rest, 4);
  f *= 5.192296858534828e33f;  // 2^112
  uint32_t b;
  std::memcpy(&b, &f, 4);
  if ((x.bits & 0x7c00u) == 0x7c00u) b |= 0x7f800000u;  // infinity or NaN
  b |= sign;
  std::memcpy(&f, &b, 4);
  return f;
}
inline Vf load(const fp16* p) { Vf v; for (int k = 0; k < kLanes; ++k) v[k] = to_float(p[k]); return v; }

template <class T>
inline Vf load_some(const T* p, int count, float rest) {
  Vf v = splat(rest);
  for (int k = 0; k < count; ++k) v[k] = to_float(p[k]);
  return v;
}
inline float reduce_max(Vf v) { float m = v[0]; for (int k = 1; k < kLanes; ++k) m = m < v[k] || v[k] != v[k] ? v[k] : m; return m; }
inline float reduce_sum(Vf v) { float s = 0; for (int k = 0; k < kLanes; ++k) s += v[k]; return s; }
}  // namespace
