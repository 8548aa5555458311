// The ops of minitron/ops on CUDA tensors.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../cuda/kernels.h"
#include "activations_check.h"
#include "cross_entropy_check.h"
#include "logit_kl_check.h"
#include "stream.h"

namespace minitron {
namespace {

Tensor new_statistics(const Tensor& student) {
    return at::empty({student.size(0), kNumStatistics}, student.options().dtype(at::kFloat));
}

Tensor statistics(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels,
                  const OptionalTensor& mask, int64_t valid_columns, int64_t label_offset,
                  double temperature, bool reverse, bool unit_sum) {
    const auto args = arguments(student, teacher, labels, mask, valid_columns, label_offset,
                                temperature, reverse, unit_sum);
    const OnDevice device(student, {&teacher, pointer(labels), pointer(mask)});
    Tensor out = new_statistics(student);
    check_launch(cuda::logit_kl_statistics(args, student.size(0), out.mutable_data_ptr<float>(),
                                           device.stream()),
                 "logit_kl_statistics");
    return out;
}

std::tuple<Tensor, Tensor> merge(const Tensor& gathered, const OptionalTensor& mask,
                                 double temperature) {
    const auto [from, ranks, tokens, read] = merge_arguments(gathered, mask);
    const OnDevice device(gathered, {pointer(mask)});
    Tensor losses = at::empty({kNumLosses, tokens}, gathered.options());
    Tensor merged = at::empty({tokens, kNumStatistics}, gathered.options());
    check_launch(cuda::logit_kl_merge(from, ranks, tokens, read, static_cast<float>(temperature),
                                      losses.mutable_data_ptr<float>(),
                                      merged.mutable_data_ptr<float>(), device.stream()),
                 "logit_kl_merge");
    return {losses, merged};
}

void gradient(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels,
              const OptionalTensor& mask, const Tensor& merged, const Tensor& weights,
              int64_t valid_columns, int64_t label_offset, double temperature, bool reverse,
              bool unit_sum, Tensor destination) {
    const auto args = arguments(student, teacher, labels, mask, valid_columns, label_offset,
                                temperature, reverse, unit_sum);
    const auto to = gradient_to(destination, student, weights);
    const float* const from = checked<float>(merged, {student.size(0), kNumStatistics}, "merged");
    const OnDevice device(
        student, {&teacher, pointer(labels), pointer(mask), &merged, &weights, &destination});
    check_launch(cuda::logit_kl_gradient(args, to, from, device.stream()), "logit_kl_gradient");
}

Tensor fused(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels,
             const OptionalTensor& mask, const Tensor& weights, int64_t valid_columns,
             double temperature, bool reverse, bool unit_sum, Tensor destination) {
    const auto args =
        arguments(student, teacher, labels, mask, valid_columns, 0, temperature, reverse, unit_sum);
    const auto to = gradient_to(destination, student, weights);
    const OnDevice device(student,
                          {&teacher, pointer(labels), pointer(mask), &weights, &destination});
    Tensor out = new_statistics(student);
    check_launch(cuda::logit_kl_fused(args, to, out.mutable_data_ptr<float>(), device.stream()),
                 "logit_kl_fused");
    return out;
}

Tensor ce_statistics(const Tensor& logits, const Tensor& labels, int64_t valid_columns,
                     int64_t label_offset) {
    const auto args = cross_entropy_arguments(logits, labels, valid_columns, label_offset);
    const OnDevice device(logits, {&labels});
    Tensor out =
        at::empty({args.tokens, kNumCrossEntropyStatistics}, logits.options().dtype(at::kFloat));
    check_launch(
        cuda::cross_entropy_statistics(args, out.mutable_data_ptr<float>(), device.stream()),
        "cross_entropy_statistics");
    return out;
}

Tensor ce_gradient(const Tensor& logits, const Tensor& labels, const Tensor& merged,
                   const Tensor& weights, int64_t valid_columns, int64_t label_offset) {
    const auto args = cross_entropy_arguments(logits, labels, valid_columns, label_offset);
    const float* const from =
        checked<float>(merged, {args.tokens, kNumCrossEntropyStatistics}, "merged");
    const float* const by = checked<float>(weights, {args.tokens}, "weights");
    const OnDevice device(logits, {&labels, &merged, &weights});
    Tensor out = at::empty_like(logits, at::MemoryFormat::Contiguous);
    check_launch(
        cuda::cross_entropy_gradient(args, from, by, out.mutable_data_ptr(), device.stream()),
        "cross_entropy_gradient");
    return out;
}

Tensor stats(const Tensor& x, int64_t group) {
    const Activations rows = grouped_activation(x, group);
    const OnDevice device(x, {});
    Tensor scratch =
        at::empty({cuda::activation_stats_scratch(rows)}, x.options().dtype(at::kFloat));
    Tensor out = new_activation_stats(x, group);
    check_launch(cuda::activation_stats(rows, scratch.mutable_data_ptr<float>(),
                                        out.mutable_data_ptr<double>(), device.stream()),
                 "activation_stats");
    return out;
}

Tensor cosine(const Tensor& before, const Tensor& after) {
    const Activations rows = compared_activations(before, after);
    const OnDevice device(before, {&after});
    Tensor out = at::empty({before.size(0), before.size(1)}, before.options().dtype(at::kFloat));
    check_launch(cuda::block_cosine(rows, after.const_data_ptr(), out.mutable_data_ptr<float>(),
                                    device.stream()),
                 "block_cosine");
    return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(minitron, CUDA, m) {
    m.impl("logit_kl_statistics", &statistics);
    m.impl("logit_kl_merge", &merge);
    m.impl("logit_kl_gradient", &gradient);
    m.impl("logit_kl_fused", &fused);
    m.impl("cross_entropy_statistics", &ce_statistics);
    m.impl("cross_entropy_gradient", &ce_gradient);
    m.impl("activation_stats", &stats);
    m.impl("block_cosine", &cosine);
}

}  // namespace minitron
