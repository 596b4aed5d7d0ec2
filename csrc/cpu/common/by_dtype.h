// SPDX-License-Identifier: Apache-2.0
#pragma once

// name(args, begin, end) of one instruction set: function<double> where args.dtype_of_args is
// float64, else function<float>.
#define VTCLIP_BY_DTYPE(name, function, Args, dtype_of_args) \
  void name(const Args& args, int64_t begin, int64_t end) {  \
    if (args.dtype_of_args == ::vtclip::Dtype::kFloat64) {   \
      function<double>(args, begin, end);                    \
    } else {                                                 \
      function<float>(args, begin, end);                     \
    }                                                        \
  }
