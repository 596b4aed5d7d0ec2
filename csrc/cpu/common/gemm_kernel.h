// SPDX-License-Identifier: Apache-2.0
// The products of gemm.h; included once per instruction set.
#include "simd.h"
#include "gemm_tiles.h"

void gemm(const Gemm<float>& g) { multiply<float, FusedMultiplyAdd<float>>(g); }
void gemm(const Gemm<double>& g) { multiply<double, FusedMultiplyAdd<double>>(g); }
