// SPDX-License-Identifier: Apache-2.0
// While `standin_cuda(1)` holds, tensors of the CPU say that they lie on cuda:0, and the device guard
// and the current stream are those of the stand-in. The names are torch's stable interface.
#include <dlfcn.h>

#include <cstdint>

namespace {

constexpr int32_t kSuccess = 0, kFailure = 1, kCuda = 1;
bool on = false;

using Get = int32_t (*)(void*, int32_t*);

// torch's own function: behind this library, or in a library that is not of the global scope
Get next(const char* name) {
  if (void* found = dlsym(RTLD_NEXT, name)) return reinterpret_cast<Get>(found);
  void* torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
  return torch == nullptr ? nullptr : reinterpret_cast<Get>(dlsym(torch, name));
}

}  // namespace

extern "C" {

void standin_cuda(int wanted) { on = wanted != 0; }

int32_t aoti_torch_get_device_type(void* tensor, int32_t* type) {
  static const Get own = next("aoti_torch_get_device_type");
  if (!on) return own == nullptr ? kFailure : own(tensor, type);
  *type = kCuda;
  return kSuccess;
}
int32_t aoti_torch_get_device_index(void* tensor, int32_t* index) {
  static const Get own = next("aoti_torch_get_device_index");
  if (!on) return own == nullptr ? kFailure : own(tensor, index);
  *index = 0;
  return kSuccess;
}
int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  static int any;
  *guard = &any;
  return kSuccess;
}
int32_t aoti_torch_delete_device_guard(void*) { return kSuccess; }
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return kSuccess;
}
}
