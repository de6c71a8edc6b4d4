// The CPU kernels for avx2.
#include "kernels.h"

#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx2,fma,f16c")
#endif
#define FLYWHEEL_TABLE kernels_avx2
#include "kernels_isa.h"
