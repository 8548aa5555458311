// What the bindings check of tensors before kernels get raw pointers.

#pragma once

#include <ATen/Version.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>

namespace minitron {

// The data of a contiguous tensor of this type and shape; internal contract, so errors are short.
template <typename T>
const T* checked(const at::Tensor& tensor, at::IntArrayRef shape, const char* name) {
    TORCH_CHECK(tensor.sizes() == shape, name, " must be ", shape, ", not ", tensor.sizes());
    TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
    return tensor.const_data_ptr<T>();
}

// Null where the argument was not given.
inline const at::Tensor* pointer(const std::optional<at::Tensor>& tensor) {
    return tensor ? &*tensor : nullptr;
}

// Of what the launchers of csrc/cuda/kernels.h return.
inline void check_launch(const char* error, const char* op) {
    TORCH_CHECK(!error, op, " could not be launched on this GPU: ", error);
}

// The instruction set that torch itself uses here: "AVX512", "AVX2", "DEFAULT" or another's name.
inline std::string_view cpu_capability() {
    static const std::string capability = at::get_cpu_capability();
    return capability;
}

}  // namespace minitron
