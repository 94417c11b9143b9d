// What torch asks of a device before it calls Python: that CUDA and MPS exist, and which of their devices is current.
// On a build of torch for the CPU; nothing here computes.
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

namespace {
bool cuda_is_there = true;

struct CUDAHooks : public at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return cuda_is_there; }
  bool isBuilt() const override { return cuda_is_there; }
  bool isAvailable() const override { return cuda_is_there; }
  void init() const override {}
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};

struct MPSHooks : public at::MPSHooksInterface {
  bool hasMPS() const override { return !cuda_is_there; }
  bool isBuilt() const override { return !cuda_is_there; }
  bool isAvailable() const override { return !cuda_is_there; }
  void init() const override {}
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};

c10::impl::DeviceGuardImplRegistrar cuda(c10::DeviceType::CUDA, new c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>());
c10::impl::DeviceGuardImplRegistrar mps(c10::DeviceType::MPS, new c10::impl::FakeGuardImpl<c10::DeviceType::MPS>());
}  // namespace

namespace at {
using ::CUDAHooks;
using ::MPSHooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, CUDAHooks)
C10_REGISTER_CLASS(MPSHooksRegistry, MPSHooks, MPSHooks)
}  // namespace at

// Autograd knows one accelerator: CUDA, or MPS while CUDA is not there.
extern "C" void pretend_cuda(bool is_there) { cuda_is_there = is_there; }
