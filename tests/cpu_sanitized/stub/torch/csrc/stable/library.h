// SPDX-License-Identifier: Apache-2.0
// Operators by name, called with values that a program has read.
#pragma once

#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <variant>

#include "tensor.h"

namespace torch::stable {

using Value = std::variant<std::monostate, Tensor, double, int64_t>;
using Kernel = std::function<std::vector<Tensor>(const std::vector<Value>&)>;

inline std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

template <class T>
T value_as(const Value& value) {
  if constexpr (std::is_same_v<T, std::optional<Tensor>>) {
    if (std::holds_alternative<std::monostate>(value)) return std::nullopt;
    return std::get<Tensor>(value);
  } else if constexpr (std::is_same_v<T, bool>) {
    return std::get<int64_t>(value) != 0;
  } else {
    return std::get<T>(value);
  }
}

inline std::vector<Tensor> results_of(const Tensor& result) { return {result}; }

template <class... Ts>
std::vector<Tensor> results_of(const std::tuple<Ts...>& results) {
  return std::apply([](const auto&... each) { return std::vector<Tensor>{each...}; }, results);
}

template <class R, class... Args, std::size_t... I>
Kernel boxed(R (*function)(Args...), std::index_sequence<I...>) {
  return [function](const std::vector<Value>& values) {
    if (values.size() != sizeof...(Args)) throw std::runtime_error("wrong number of arguments");
    return results_of(function(value_as<Args>(values[I])...));
  };
}

template <class R, class... Args>
Kernel boxed(R (*function)(Args...)) {
  return boxed(function, std::index_sequence_for<Args...>{});
}

struct Library {
  explicit Library(void (*fill)(Library&)) { fill(*this); }
  void impl(const char* name, Kernel kernel) { kernels()[name] = std::move(kernel); }
};

}  // namespace torch::stable

#define TORCH_BOX(function) ::torch::stable::boxed(function)
#define STABLE_TORCH_LIBRARY_IMPL(folder, Key, m)                  \
  static void fill_library(::torch::stable::Library&);             \
  static const ::torch::stable::Library registered{&fill_library}; \
  static void fill_library(::torch::stable::Library& m)
