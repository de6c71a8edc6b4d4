// The CPU kernels for avx512.
#include "kernels.h"

#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define FLYWHEEL_TABLE kernels_avx512
#include "kernels_isa.h"
