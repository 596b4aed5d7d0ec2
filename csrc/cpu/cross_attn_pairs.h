// SPDX-License-Identifier: Apache-2.0
// Forward attention by products of bfloat16 pairs, where the processor has them.
#pragma once

#include "cpu/common/attn_host.h"
#include "cpu/common/capability.h"

namespace vtclip::cpu {

namespace avx512 {
void cross_attn_fwd_units(const AttnForward& p, int64_t begin, int64_t end);
}

bool has_pairs(const AttnShape& shape);

// out and lse of `p`; notes a packed shared query in it.
void cross_attn_pairs_fwd(AttnForward& p, const Tensor& query);

}  // namespace vtclip::cpu
