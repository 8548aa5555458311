// The ops of minitron/ops/activation_stats.py and block_cosine.py on CPU tensors.

#include "../cpu/activations.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "check.h"
#include "parallel.h"

namespace minitron {
namespace {

using at::Tensor;

void check_activation(const Tensor& x) {
    TORCH_CHECK(x.dim() == 3, "an activation must be [s, b, c], not ", x.sizes());
    TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16,
                "an activation must be fp32 or bf16, not ", x.scalar_type());
    TORCH_CHECK(x.is_contiguous(), "an activation must be contiguous");
}

Tensor stats(const Tensor& x, int64_t group) {
    check_activation(x);
    TORCH_CHECK(group >= 1 && x.size(2) % group == 0, "group=", group, " does not divide ",
                x.size(2));
    const Activations rows = {x.const_data_ptr(), x.size(0), x.size(1) * x.size(2), group,
                              x.scalar_type() == at::kBFloat16};
    Tensor out = at::empty({kNumActivationStats, x.size(1), x.size(2) / group},
                           x.options().dtype(at::kDouble));
    double* const to = out.mutable_data_ptr<double>();
    const int64_t block = group > 1 ? group : kColumnBlock;
    const auto kernel = activation_stats_on_this_cpu(cpu_capability());
    const int64_t least = group > 1 ? 1 : 16;  // a row's part should be long enough to prefetch
    share_out((rows.columns + block - 1) / block, least,
              [&](int64_t begin, int64_t end) { kernel(rows, begin, end, to); });
    return out;
}

Tensor cosine(const Tensor& before, const Tensor& after) {
    check_activation(before);
    check_activation(after);
    TORCH_CHECK(before.sizes() == after.sizes() && before.scalar_type() == after.scalar_type(),
                "the two activations differ in shape or dtype");
    const Activations rows = {before.const_data_ptr(), before.size(0) * before.size(1),
                              before.size(2), 1, before.scalar_type() == at::kBFloat16};
    Tensor out = at::empty({before.size(0), before.size(1)}, before.options().dtype(at::kFloat));
    float* const to = out.mutable_data_ptr<float>();
    const void* const other = after.const_data_ptr();
    const auto kernel = block_cosine_on_this_cpu(cpu_capability());
    share_out(rows.rows, 16,
              [&](int64_t begin, int64_t end) { kernel(rows, other, begin, end, to); });
    return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(minitron, CPU, m) {
    m.impl("activation_stats", &stats);
    m.impl("block_cosine", &cosine);
}

}  // namespace minitron
