// SPDX-License-Identifier: Apache-2.0
// Element types the kernels read and write, and the type they compute in.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace vtclip {

using torch::headeronly::ScalarType;

enum class Dtype : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

inline bool is_supported(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      return Dtype::kFloat32;
  }
}

// float64 accumulates in float64, everything else in float32.
inline ScalarType acc_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline int64_t item_bytes(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

}  // namespace vtclip
