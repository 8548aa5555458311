// The ops of minitron/ops/activation_stats.py and block_cosine.py on CPU tensors.

#include "../cpu/activations.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "activations_check.h"
#include "check.h"
#include "parallel.h"

namespace minitron {
namespace {

using at::Tensor;

Tensor stats(const Tensor& x, int64_t group) {
    const Activations rows = grouped_activation(x, group);
    Tensor out = new_activation_stats(x, group);
    double* const to = out.mutable_data_ptr<double>();
    const int64_t block = group > 1 ? group : kColumnBlock;
    const auto kernel = activation_stats_on_this_cpu(cpu_capability());
    const int64_t least = group > 1 ? 1 : 16;  // a row's part should be long enough to prefetch
    share_out((rows.columns + block - 1) / block, least,
              [&](int64_t begin, int64_t end) { kernel(rows, begin, end, to); });
    return out;
}

Tensor cosine(const Tensor& before, const Tensor& after) {
    const Activations rows = compared_activations(before, after);
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
