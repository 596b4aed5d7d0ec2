// SPDX-License-Identifier: Apache-2.0
#include "cpu/cross_attn_pairs.h"

#define VTCLIP_KERNEL "cpu/cross_attn_pairs_kernel.h"
#include "cpu/common/bfloat16_capability.h"

namespace vtclip::cpu {

bool has_pairs(const AttnShape& shape) {
  return VTCLIP_X86_BF16 && capability() == Capability::kAvx512Bf16 &&
         shape.dtype == Dtype::kBFloat16;
}

#if VTCLIP_X86_BF16
void cross_attn_pairs_fwd(AttnForward& p, const Tensor& query) {
  const AttnShape& s = p.shape;
  Tensor pack;
  if (s.query_shared) {
    const int64_t units = s.H * s.num_blocks();
    pack = new_acc(query, {units * (ceil_div(s.d, 2) * panel_width(s.query_block) + avx512_bf16::kMark)});
    p.query_pack = pack.data_ptr();
    const SharedQuery args{s, p.query, p.query_pack, 1};
    run(avx512_bf16::cross_attn_pairs_query_units, args, units, 2 * s.query_block * s.d);
  }
  run(avx512_bf16::cross_attn_pairs_fwd_units, p, s.B * s.H * s.num_blocks(), block_work(s));
}
#else
void cross_attn_pairs_fwd(AttnForward&, const Tensor&) {}
#endif

}  // namespace vtclip::cpu
