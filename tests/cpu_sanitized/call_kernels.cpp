// SPDX-License-Identifier: Apache-2.0
// Calls registered operators until standard input ends. A call is a number of threads, a name and
// values (conftest.py writes them); the answer is a number of bytes, and the results in them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdio>
#include <cstdlib>
#include <iostream>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::Value;

constexpr ScalarType kTypes[] = {ScalarType::Float,    ScalarType::Double, ScalarType::Half,
                                 ScalarType::BFloat16, ScalarType::Bool,   ScalarType::Long};

bool read_bytes(void* to, std::size_t size) {
  return size == 0 || std::fread(to, 1, size, stdin) == size;
}

template <class T>
T read_one() {
  T value{};
  if (!read_bytes(&value, sizeof value)) std::abort();
  return value;
}

std::vector<int64_t> read_ints() {
  std::vector<int64_t> values(static_cast<std::size_t>(read_one<int64_t>()));
  if (!read_bytes(values.data(), values.size() * sizeof(int64_t))) std::abort();
  return values;
}

Value read_tensor() {
  const std::vector<int64_t> head = read_ints();  // empty: none is given
  if (head.empty()) return {};
  const ScalarType type = kTypes[head.at(0)];
  const std::vector<int64_t> sizes = read_ints(), strides = read_ints();
  Tensor tensor(type, sizes, strides, head.at(1), head.at(2));
  const int64_t bytes = head.at(1) * torch::stable::item_bytes(type);
  if (!read_bytes(tensor.data_ptr(), static_cast<std::size_t>(bytes))) std::abort();
  return tensor;
}

Value read_value() {
  switch (read_one<char>()) {
    case 't':
      return read_tensor();
    case 'd':
      return read_one<double>();
    case 'i':
      return read_one<int64_t>();
    default:
      std::abort();
  }
}

template <class T>
void append(std::string& out, const T* values, std::size_t count) {
  if (count != 0) out.append(reinterpret_cast<const char*>(values), count * sizeof(T));
}

// The elements in the order of their indices.
void append_elements(std::string& out, const Tensor& tensor, const char* from, int64_t axis) {
  const int64_t item = torch::stable::item_bytes(tensor.scalar_type());
  if (axis == tensor.dim()) return append(out, from, static_cast<std::size_t>(item));
  for (int64_t i = 0; i < tensor.size(axis); ++i) {
    append_elements(out, tensor, from + i * tensor.stride(axis) * item, axis + 1);
  }
}

void append(std::string& out, const Tensor& tensor) {
  int64_t code = 0;
  while (kTypes[code] != tensor.scalar_type()) ++code;
  const int64_t head[] = {code, tensor.dim()};
  append(out, head, 2);
  append(out, tensor.sizes().data(), tensor.sizes().size());
  if (tensor.numel() != 0) {
    append_elements(out, tensor, static_cast<const char*>(tensor.data_ptr()), 0);
  }
}

void answer() {
  std::string name(static_cast<std::size_t>(read_one<int64_t>()), ' ');
  if (!read_bytes(name.data(), name.size())) std::abort();
  std::vector<Value> values;
  for (int64_t left = read_one<int64_t>(); left > 0; --left) values.push_back(read_value());
  std::string out;
  for (const Tensor& result : torch::stable::kernels().at(name)(values)) append(out, result);
  const auto size = static_cast<int64_t>(out.size());
  std::fwrite(&size, sizeof size, 1, stdout);
  std::fwrite(out.data(), 1, out.size(), stdout);
  std::fflush(stdout);
}

}  // namespace

int main() {
  try {
    while (read_bytes(&torch::stable::num_threads, sizeof(int64_t))) answer();
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
