// The part of the CUDA runtime, and of LibTorch's CUDA functions, that csrc/cuda calls. Launches and allocations of the
// ops go to Python.

#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

struct Dim {
  unsigned x, y, z;
};

struct Configuration {
  Dim grid, block;
  size_t shared;
  void* stream;
};

using Tensor = void*;
using Launched = int (*)(const char* kernel, const unsigned* geometry, size_t shared, void** arguments);
using Allocated = void (*)(void* data, int64_t bytes, int fresh);

std::unordered_map<const void*, std::string>& names() {
  static std::unordered_map<const void*, std::string> found;
  return found;
}

thread_local std::vector<Configuration> configurations;
thread_local int last_error = 0;
thread_local std::vector<Tensor> kept;  // so that no address is used twice within a call
Launched launched = nullptr;
Allocated allocated = nullptr;

// The function of LibTorch that one of ours hides.
template <class F>
F* behind(const char* name) {
  static void* const library = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
  void* const found = library ? dlsym(library, name) : nullptr;
  if (found == nullptr) std::abort();
  return reinterpret_cast<F*>(found);
}

void announce(Tensor tensor, bool fresh) {
  static auto* const data_of = behind<int32_t(Tensor, void**)>("aoti_torch_get_data_ptr");
  static auto* const bytes_of = behind<int32_t(Tensor, int64_t*)>("aoti_torch_get_storage_size");
  static auto* const share = behind<int32_t(Tensor, Tensor*)>("aoti_torch_new_tensor_handle");
  void* data = nullptr;
  int64_t bytes = 0;
  Tensor again = nullptr;
  if (data_of(tensor, &data) || bytes_of(tensor, &bytes) || share(tensor, &again)) std::abort();
  kept.push_back(again);
  if (fresh) std::memset(data, 0xff, bytes);  // NaN, or -1
  if (allocated != nullptr) allocated(data, bytes, fresh);
}

}  // namespace

extern "C" {

void ptx_hooks(Launched of_launch, Allocated of_tensor) {
  launched = of_launch;
  allocated = of_tensor;
}

// At the end of a call of an op.
void ptx_release() {
  static auto* const release = behind<int32_t(Tensor)>("aoti_torch_delete_tensor_object");
  for (Tensor tensor : kept) release(tensor);
  kept.clear();
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  names()[host] = name;
}
unsigned __cudaPushCallConfiguration(Dim grid, Dim block, size_t shared, void* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
int __cudaPopCallConfiguration(Dim* grid, Dim* block, size_t* shared, void* stream) {
  const Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid, *block = last.block, *shared = last.shared;
  std::memcpy(stream, &last.stream, sizeof last.stream);
  return 0;
}
int __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return 0;
}
int cudaLaunchKernel(const void* host, Dim grid, Dim block, void** arguments, size_t shared, void*) {
  constexpr int NO_CONFIGURATION = 9;
  const unsigned geometry[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  bool possible = launched != nullptr && block.x * block.y * block.z <= 1024 && grid.y <= 65535 && grid.z <= 65535;
  for (const unsigned size : geometry) possible &= size > 0;
  last_error = possible ? launched(names().at(host).c_str(), geometry, shared, arguments) : NO_CONFIGURATION;
  return last_error;
}
int __cudaLaunchKernel(const void* host, Dim grid, Dim block, void** arguments, size_t shared, void* stream) {
  return cudaLaunchKernel(host, grid, block, arguments, shared, stream);
}
int cudaGetLastError() {
  const int error = last_error;
  last_error = 0;
  return error;
}
int cudaPeekAtLastError() { return last_error; }

int32_t torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  *message = error == 0 ? nullptr : strdup(("CUDA error " + std::to_string(error)).c_str());
  return 0;
}
void torch_c10_cuda_free_error_msg(char* message) { std::free(message); }
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
int32_t aoti_torch_delete_device_guard(void*) { return 0; }

int32_t aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                 int32_t device, int32_t index, Tensor* result) {
  static auto* const real = behind<decltype(aoti_torch_empty_strided)>("aoti_torch_empty_strided");
  const int32_t error = real(dims, sizes, strides, dtype, device, index, result);
  if (error == 0) announce(*result, true);
  return error;
}

// An operation of torch whose result is a tensor, such as a running count.
int32_t torch_call_dispatcher(const char* name, const char* overload, uint64_t* stack, uint64_t version) {
  static auto* const real = behind<decltype(torch_call_dispatcher)>("torch_call_dispatcher");
  const int32_t error = real(name, overload, stack, version);
  if (error == 0) announce(reinterpret_cast<Tensor>(stack[0]), false);
  return error;
}
}
