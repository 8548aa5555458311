// The ops of minitron/ops/cross_entropy.py on CPU tensors.

#include "../cpu/cross_entropy.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cross_entropy_check.h"
#include "parallel.h"

namespace minitron {
namespace {

Tensor statistics(const Tensor& logits, const Tensor& labels, int64_t valid_columns,
                  int64_t label_offset) {
    const auto args = cross_entropy_arguments(logits, labels, valid_columns, label_offset);
    Tensor out =
        at::empty({args.tokens, kNumCrossEntropyStatistics}, logits.options().dtype(at::kFloat));
    const auto kernel = cross_entropy_statistics_on_this_cpu(cpu_capability());
    float* const to = out.mutable_data_ptr<float>();
    share_out(args.tokens, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end, to); });
    return out;
}

Tensor gradient(const Tensor& logits, const Tensor& labels, const Tensor& merged,
                const Tensor& weights, int64_t valid_columns, int64_t label_offset) {
    const auto args = cross_entropy_arguments(logits, labels, valid_columns, label_offset);
    const float* const from =
        checked<float>(merged, {args.tokens, kNumCrossEntropyStatistics}, "merged");
    const float* const by = checked<float>(weights, {args.tokens}, "weights");
    Tensor out = at::empty_like(logits, at::MemoryFormat::Contiguous);
    const auto kernel = cross_entropy_gradient_on_this_cpu(cpu_capability());
    void* const to = out.mutable_data_ptr();
    share_out(args.tokens, 1,
              [&](int64_t begin, int64_t end) { kernel(args, from, by, to, begin, end); });
    return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(minitron, CPU, m) {
    m.impl("cross_entropy_statistics", &statistics);
    m.impl("cross_entropy_gradient", &gradient);
}

}  // namespace minitron
