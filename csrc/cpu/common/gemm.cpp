// SPDX-License-Identifier: Apache-2.0
#include "gemm.h"

#define VTCLIP_KERNEL "cpu/common/gemm_kernel.h"
#include "foreach_capability.h"
