// SPDX-License-Identifier: Apache-2.0
// Checks that protect memory. Each message names the operator, the argument, the wish and the fact.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "dtype.h"

namespace vtclip {

using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

inline std::string shape_text(const int64_t* sizes, size_t rank) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < rank; ++i) text << (i ? ", " : "") << sizes[i];
  text << "]";
  return text.str();
}

inline std::string shape_text(const Tensor& tensor) {
  return shape_text(tensor.sizes().data(), static_cast<size_t>(tensor.dim()));
}

inline void check_rank(const char* op, const char* name, const Tensor& tensor, int64_t rank) {
  if (tensor.dim() != rank) {
    fail(op, name, " must have ", rank, " dimensions, got ", shape_text(tensor));
  }
}

// `first_may_be_one`: the first axis is 1 where it is shared over the batch
inline bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> wanted,
                      bool first_may_be_one = false) {
  if (tensor.dim() != static_cast<int64_t>(wanted.size())) return false;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    const bool shared = first_may_be_one && axis == 0 && tensor.size(0) == 1;
    if (tensor.size(axis) != wanted.begin()[axis] && !shared) return false;
  }
  return true;
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor,
                        std::initializer_list<int64_t> wanted) {
  if (has_shape(tensor, wanted)) return;
  fail(op, name, " must be ", shape_text(wanted.begin(), wanted.size()), ", got ",
       shape_text(tensor));
}

inline void check_shape_or_shared(const char* op, const char* name, const Tensor& tensor,
                                  std::initializer_list<int64_t> wanted) {
  if (has_shape(tensor, wanted, true)) return;
  fail(op, name, " must be ", shape_text(wanted.begin(), wanted.size()),
       " (first axis 1 if shared), got ", shape_text(tensor));
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType wanted) {
  if (tensor.scalar_type() != wanted) {
    fail(op, name, " must have dtype ", torch::headeronly::toString(wanted), ", got ",
         torch::headeronly::toString(tensor.scalar_type()));
  }
}

inline void check_cpu(const char* op, const char* name, const Tensor& tensor) {
  if (!tensor.is_cpu()) fail(op, name, " must be on the CPU, got another device");
}

// A float CPU tensor of a supported type; returns that type.
inline ScalarType check_float(const char* op, const char* name, const Tensor& tensor) {
  check_cpu(op, name, tensor);
  const ScalarType type = tensor.scalar_type();
  if (!is_supported(type)) {
    fail(op, name, " must have dtype Float, Double, Half or BFloat16, got ",
         torch::headeronly::toString(type));
  }
  return type;
}

// check_same: device and dtype, with `sizes` the shape too. On the CPU
inline void check_same(const char* op, const char* name, const Tensor& tensor, ScalarType type) {
  check_cpu(op, name, tensor);
  check_dtype(op, name, tensor, type);
}

inline void check_same(const char* op, const char* name, const Tensor& tensor, ScalarType type,
                       std::initializer_list<int64_t> sizes) {
  check_same(op, name, tensor, type);
  check_shape(op, name, tensor, sizes);
}

// and on the CUDA device of `like`.
inline void check_same(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                       ScalarType type) {
  if (!tensor.is_cuda() || tensor.get_device_index() != like.get_device_index()) {
    fail(op, name, " must be on CUDA device ", like.get_device_index(), ", got another device");
  }
  check_dtype(op, name, tensor, type);
}

inline void check_same(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                       ScalarType type, std::initializer_list<int64_t> sizes) {
  check_same(op, name, tensor, like, type);
  check_shape(op, name, tensor, sizes);
}

}  // namespace vtclip
