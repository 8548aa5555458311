// The accelerator that an op's tensors are on, without its headers.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <initializer_list>

// Of libtorch_cuda, which the extension is not linked with; torch before 2.11 has no
// native_handle().
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device,
                                                                            void** stream);

namespace minitron {

template <typename Stream>
void* native_handle(const Stream& stream) {
    if constexpr (requires { stream.native_handle(); }) {
        return stream.native_handle();
    } else {
        void* handle = nullptr;
        TORCH_CHECK(aoti_torch_get_current_cuda_stream &&
                        !aoti_torch_get_current_cuda_stream(stream.device_index(), &handle),
                    "this torch does not tell its current CUDA stream; use torch >= 2.11");
        return handle;
    }
}

// Makes the device of tensors the current one while it lives, and knows its current stream.
class OnDevice {
  public:
    // Null stands for an argument that was not given.
    OnDevice(const at::Tensor& first, std::initializer_list<const at::Tensor*> others)
        : guard_(first.device()),
          stream_(c10::impl::VirtualGuardImpl(first.device().type()).getStream(first.device())) {
        for (const at::Tensor* other : others) {
            TORCH_CHECK(!other || other->device() == first.device(), "tensors on ", first.device(),
                        " and ", other->device());
        }
    }

    void* stream() const { return native_handle(stream_); }

  private:
    c10::DeviceGuard guard_;
    c10::Stream stream_;
};

}  // namespace minitron
