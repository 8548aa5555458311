// From the tensors that the ops of minitron/ops/activation_stats.py and block_cosine.py get to the
// arguments of their kernels.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "activation_arguments.h"

namespace minitron {

inline void check_activation(const at::Tensor& x) {
    TORCH_CHECK(x.dim() == 3, "an activation must be [s, b, c], not ", x.sizes());
    TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16,
                "an activation must be fp32 or bf16, not ", x.scalar_type());
    TORCH_CHECK(x.is_contiguous(), "an activation must be contiguous");
}

inline Activations grouped_activation(const at::Tensor& x, int64_t group) {
    check_activation(x);
    TORCH_CHECK(group >= 1 && x.size(2) % group == 0, "group=", group, " does not divide ",
                x.size(2));
    return {x.const_data_ptr(), x.size(0), x.size(1) * x.size(2), group,
            x.scalar_type() == at::kBFloat16};
}

inline at::Tensor new_activation_stats(const at::Tensor& x, int64_t group) {
    return at::empty({kNumActivationStats, x.size(1), x.size(2) / group},
                     x.options().dtype(at::kDouble));
}

// Of the first; the second has the same shape and dtype.
inline Activations compared_activations(const at::Tensor& before, const at::Tensor& after) {
    check_activation(before);
    check_activation(after);
    TORCH_CHECK(before.sizes() == after.sizes() && before.scalar_type() == after.scalar_type(),
                "the two activations differ in shape or dtype");
    return {before.const_data_ptr(), before.size(0) * before.size(1), before.size(2), 1,
            before.scalar_type() == at::kBFloat16};
}

}  // namespace minitron
