// SPDX-License-Identifier: Apache-2.0
// What csrc/cpu uses of torch's stable ABI, without torch: a tensor lies in a heap block of exactly
// its bytes, and ranges run on threads that a sanitizer can follow. A file of csrc/cpu that uses
// more of the ABI does not compile here until it is added.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace torch::stable {

using headeronly::ScalarType;

inline int64_t item_bytes(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
      return 4;
    case ScalarType::Bool:
      return 1;
    default:
      return 2;
  }
}

class Tensor {
 public:
  Tensor() = default;
  // A block of `count` elements after `offset` others, every byte 0xff: NaN, and true.
  Tensor(ScalarType type, std::vector<int64_t> sizes, std::vector<int64_t> strides, int64_t count,
         int64_t offset)
      : type_(type), sizes_(std::move(sizes)), strides_(std::move(strides)) {
    if (count == 0) return;  // torch's empty tensors have no memory either
    const auto bytes = static_cast<std::size_t>((count + offset) * item_bytes(type));
    block_.reset(new unsigned char[bytes]);
    std::memset(block_.get(), 0xff, bytes);
    data_ = block_.get() + offset * item_bytes(type);
  }

  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t size(int64_t axis) const { return sizes_.at(static_cast<std::size_t>(axis)); }
  int64_t stride(int64_t axis) const { return strides_.at(static_cast<std::size_t>(axis)); }
  const std::vector<int64_t>& sizes() const { return sizes_; }
  ScalarType scalar_type() const { return type_; }
  void* data_ptr() const { return data_; }
  bool is_cpu() const { return true; }
  bool is_cuda() const { return false; }
  int get_device_index() const { return 0; }
  int64_t numel() const {
    int64_t count = 1;
    for (const int64_t size : sizes_) count *= size;
    return count;
  }
  Tensor transposed(int64_t one, int64_t other) const {
    Tensor view = *this;
    const auto i = static_cast<std::size_t>(one), j = static_cast<std::size_t>(other);
    std::swap(view.sizes_.at(i), view.sizes_.at(j));
    std::swap(view.strides_.at(i), view.strides_.at(j));
    return view;
  }

 private:
  ScalarType type_ = ScalarType::Float;
  std::vector<int64_t> sizes_, strides_;
  std::shared_ptr<unsigned char[]> block_;
  unsigned char* data_ = nullptr;
};

inline Tensor contiguous(ScalarType type, std::vector<int64_t> sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  int64_t count = 1;
  for (std::size_t axis = sizes.size(); axis-- > 0;) {
    strides[axis] = count;
    count *= sizes[axis];
  }
  return {type, std::move(sizes), std::move(strides), count, 0};
}

}  // namespace torch::stable
