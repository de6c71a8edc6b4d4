// Which of the compiled instruction sets this processor runs. Each kernel is compiled once for each.
#pragma once

namespace flywheel {
enum class Isa { kBaseline, kAvx2, kAvx512 };

inline Isa isa() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const Isa found = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
                               ? Isa::kAvx512
                           : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::kAvx2
                                                                                            : Isa::kBaseline;
  return found;
#else
  return Isa::kBaseline;
#endif
}

inline const char* isa_name(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "baseline";
}
}  // namespace flywheel
