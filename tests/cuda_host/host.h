// SPDX-License-Identifier: Apache-2.0
// Drives bodies of csrc/cuda on the host: a program reads tensors and numbers from standard input
// and writes tensors to standard output, in the format of conftest.py.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda/block/block.h"
#include "cuda/block/tile_io.h"

namespace host {

inline void read_bytes(void* to, size_t size) {
  if (size != 0 && std::fread(to, 1, size, stdin) != size) std::abort();
}

inline std::vector<int64_t> read_ints() {
  int64_t count = 0;
  read_bytes(&count, sizeof count);
  std::vector<int64_t> values(static_cast<size_t>(count));
  read_bytes(values.data(), values.size() * sizeof(int64_t));
  return values;
}

enum Dtype : int64_t { kFloat32, kFloat64, kFloat16, kBFloat16, kBool, kInt64 };

inline size_t item_bytes(int64_t dtype) {
  const size_t sizes[] = {4, 8, 2, 2, 1, 8};
  return sizes[dtype];
}

template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> { static constexpr int64_t value = kFloat32; };
template <>
struct DtypeOf<double> { static constexpr int64_t value = kFloat64; };
template <>
struct DtypeOf<torch::headeronly::Half> { static constexpr int64_t value = kFloat16; };
template <>
struct DtypeOf<torch::headeronly::BFloat16> { static constexpr int64_t value = kBFloat16; };
template <>
struct DtypeOf<bool> { static constexpr int64_t value = kBool; };
template <>
struct DtypeOf<int64_t> { static constexpr int64_t value = kInt64; };

// Elements lie in a heap block of exactly the bytes they span, so that a sanitizer sees what is
// read or written outside.
class Tensor {
 public:
  std::vector<int64_t> sizes, strides;  // strides in elements
  int64_t dtype = kFloat32;

  bool given() const { return bytes_ != nullptr; }
  int64_t size(int axis) const { return sizes.at(static_cast<size_t>(axis)); }
  int64_t stride(int axis) const { return strides.at(static_cast<size_t>(axis)); }
  int64_t numel() const {
    int64_t count = 1;
    for (const int64_t size : sizes) count *= size;
    return count;
  }
  template <class T>
  T* data() const {
    if (!given()) return nullptr;
    if (dtype != DtypeOf<T>::value) std::abort();
    return reinterpret_cast<T*>(bytes_.get()) + offset_;
  }

  // contiguous, every byte 0xff
  static Tensor empty(int64_t dtype, std::vector<int64_t> sizes) {
    Tensor tensor;
    tensor.dtype = dtype;
    tensor.sizes = std::move(sizes);
    tensor.strides.assign(tensor.sizes.size(), 1);
    for (size_t axis = tensor.sizes.size(); axis-- > 1;) {
      tensor.strides[axis - 1] = tensor.strides[axis] * tensor.sizes[axis];
    }
    tensor.reserve(tensor.numel(), 0);
    return tensor;
  }
  template <class T>
  static Tensor empty(std::vector<int64_t> sizes) {
    return empty(DtypeOf<T>::value, std::move(sizes));
  }

  static Tensor read() {
    Tensor tensor;
    const std::vector<int64_t> head = read_ints();  // empty: not given
    if (head.empty()) return tensor;
    tensor.dtype = head.at(0);
    tensor.sizes = read_ints();
    tensor.strides = read_ints();
    tensor.reserve(head.at(1), head.at(2));
    const size_t item = item_bytes(tensor.dtype);
    read_bytes(tensor.bytes_.get() + static_cast<size_t>(tensor.offset_) * item,
               static_cast<size_t>(head.at(1)) * item);
    return tensor;
  }

  // a contiguous tensor
  void write() const {
    const int64_t head[] = {dtype, static_cast<int64_t>(sizes.size())};
    std::fwrite(head, sizeof(int64_t), 2, stdout);
    std::fwrite(sizes.data(), sizeof(int64_t), sizes.size(), stdout);
    std::fwrite(bytes_.get(), item_bytes(dtype), static_cast<size_t>(numel()), stdout);
  }

 private:
  void reserve(int64_t count, int64_t offset) {
    const size_t size = static_cast<size_t>(count + offset) * item_bytes(dtype);
    bytes_.reset(new unsigned char[size]);
    std::memset(bytes_.get(), 0xff, size);
    offset_ = offset;
  }

  std::shared_ptr<unsigned char[]> bytes_;
  int64_t offset_ = 0;
};

// The whole of standard input.
struct Input {
  std::vector<int64_t> ints;
  std::vector<double> numbers;
  std::vector<Tensor> tensors;

  Input() {
    ints = read_ints();
    vtclip::cuda::backwards = ints.at(0) != 0;
    ints.erase(ints.begin());
    int64_t count = 0;
    read_bytes(&count, sizeof count);
    numbers.resize(static_cast<size_t>(count));
    read_bytes(numbers.data(), numbers.size() * sizeof(double));
    read_bytes(&count, sizeof count);
    for (int64_t i = 0; i < count; ++i) tensors.push_back(Tensor::read());
  }
};

// run(T{}) with the element type of `like`
template <class Run>
void with_dtype(const Tensor& like, Run run) {
  switch (like.dtype) {
    case kFloat32: return run(float{});
    case kFloat64: return run(double{});
    case kFloat16: return run(torch::headeronly::Half{});
    case kBFloat16: return run(torch::headeronly::BFloat16{});
    default: std::abort();
  }
}

// A whole program: run(T{}, input) with the element type of the first tensor.
template <class Run>
int program(Run run) {
  const Input in;
  with_dtype(in.tensors.at(0), [&](auto t) { run(t, in); });
  return 0;
}

// the last two axes of a tensor as a matrix
template <class T>
vtclip::cuda::Rows<T> rows_of(const Tensor& tensor) {
  const int rank = static_cast<int>(tensor.sizes.size());
  using Element = std::remove_const_t<T>;
  return {tensor.data<Element>(), tensor.stride(rank - 2), tensor.stride(rank - 1)};
}

// what a launch of `blocks` blocks does, one block after another
template <class Body>
void launch(int64_t blocks, const typename Body::Args& args) {
  vtclip::cuda::in_turn(blocks, [&](int64_t index) {
    vtclip::cuda::Shared shared;
    typename Body::Tiles tiles{shared};
    Body::run(args, index, tiles);
    if (!vtclip::cuda::copies.empty()) std::abort();  // nobody waited for them
  });
}

}  // namespace host
