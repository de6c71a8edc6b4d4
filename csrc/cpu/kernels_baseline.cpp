// The CPU kernels for baseline.
#include "kernels.h"

#include <cstring>

#define FLYWHEEL_TABLE kernels_baseline
#include "kernels_isa.h"
