// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/library.h>

// vtclip::folder::op_fwd and op_bwd as the operators of these names for tensors of device `Key`.
#define VTCLIP_REGISTER(Key, folder, op)                       \
  STABLE_TORCH_LIBRARY_IMPL(vtclip, Key, m) {                  \
    m.impl(#op "_fwd", TORCH_BOX(&vtclip::folder::op##_fwd)); \
    m.impl(#op "_bwd", TORCH_BOX(&vtclip::folder::op##_bwd)); \
  }
