// SPDX-License-Identifier: Apache-2.0
// The part of the CUDA runtime that compiled host code calls, for a GPU that is not there.
//
// nvcc's registration tells which function of the host stands for which entry of the PTX; a launch
// is held to the limits of a device and handed to `standin_on_launch`'s function.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

namespace {

struct Dim3 {
  unsigned x, y, z;
};

// the parameters of a launch as bytes stay behind `arguments`, in the order of the kernel's
using OnLaunch = void (*)(const char* entry, const unsigned* grid_and_block, uint64_t shared,
                          void** arguments);

enum Status { kSuccess = 0, kInvalidValue = 1, kInvalidConfiguration = 9, kNoFunction = 98 };
constexpr unsigned kMaxThreads = 1024, kMaxGridX = 2147483647u, kMaxGridYZ = 65535u;
constexpr int kDefaultShared = 48 * 1024;

struct Device {
  int capability = 90, shared = 227 * 1024;
};

struct Function {
  std::string entry;
  int shared = kDefaultShared;
};

Device device;
OnLaunch on_launch = nullptr;
int last = kSuccess;
struct {
  Dim3 grid, block;
  size_t shared;
  void* stream;
} pushed;

std::map<const void*, Function>& functions() {
  static auto* all = new std::map<const void*, Function>;  // registration runs before any static
  return *all;
}

int failed(int status, const char* what, const std::string& entry) {
  std::fprintf(stderr, "stand-in of the CUDA runtime: %s: %s\n", entry.c_str(), what);
  return last = status;
}

}  // namespace

extern "C" {

void standin_on_launch(OnLaunch function) { on_launch = function; }

void standin_device(int capability, int shared) { device = {capability, shared}; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle[16];
  return handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaInitModule(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* entry, int, void*, void*,
                            void*, void*, int*) {
  functions()[host].entry = entry;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterManagedVar(void**, void**, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<void**>(stream) = pushed.stream;
  return kSuccess;
}
int __cudaGetKernel(const void** out, const void* host) {
  *out = host;
  return kSuccess;
}

int cudaLaunchKernel(const void* host, Dim3 grid, Dim3 block, void** arguments, size_t shared,
                     void*) {
  const auto found = functions().find(host);
  if (found == functions().end()) return failed(kNoFunction, "not a kernel", "launch");
  const Function& function = found->second;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > kMaxGridX || grid.y > kMaxGridYZ ||
      grid.z > kMaxGridYZ) {
    return failed(kInvalidConfiguration, "grid out of range", function.entry);
  }
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64) {
    return failed(kInvalidConfiguration, "block out of range", function.entry);
  }
  if (shared > static_cast<size_t>(function.shared)) {
    return failed(kInvalidValue, "more shared memory than its attribute allows", function.entry);
  }
  const unsigned sizes[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  if (on_launch) on_launch(function.entry.c_str(), sizes, shared, arguments);
  return kSuccess;
}
int __cudaLaunchKernel(const void* host, Dim3 grid, Dim3 block, void** arguments, size_t shared,
                       void* stream) {
  return cudaLaunchKernel(host, grid, block, arguments, shared, stream);
}

int cudaFuncSetAttribute(const void* host, int attribute, int value) {
  constexpr int kMaxDynamicShared = 8;
  const auto found = functions().find(host);
  if (found == functions().end()) return failed(kNoFunction, "not a kernel", "attribute");
  if (attribute != kMaxDynamicShared) return kSuccess;
  if (value < 0 || value > device.shared) {
    return failed(kInvalidValue, "more shared memory than the device has", found->second.entry);
  }
  found->second.shared = value;
  return kSuccess;
}

int cudaDeviceGetAttribute(int* value, int attribute, int) {
  constexpr int kMultiprocessors = 16, kMajor = 75, kMinor = 76, kSharedOptin = 97;
  switch (attribute) {
    case kMultiprocessors: *value = 132; return kSuccess;
    case kMajor: *value = device.capability / 10; return kSuccess;
    case kMinor: *value = device.capability % 10; return kSuccess;
    case kSharedOptin: *value = device.shared; return kSuccess;
    default: return failed(kInvalidValue, "an attribute it does not know", "device");
  }
}

int cudaGetLastError() {
  const int status = last;
  last = kSuccess;
  return status;
}
int cudaPeekAtLastError() { return last; }
const char* cudaGetErrorString(int status) {
  return status == kInvalidConfiguration ? "invalid configuration argument" : "invalid argument";
}
}
