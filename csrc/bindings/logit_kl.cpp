// The ops of minitron/ops/logit_kl.py on CPU tensors.

#include "../cpu/logit_kl.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "logit_kl_check.h"
#include "parallel.h"

namespace minitron {
namespace {

Tensor statistics(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels,
                  const OptionalTensor& mask, int64_t valid_columns, int64_t label_offset,
                  double temperature, bool reverse, bool unit_sum) {
    const auto args = arguments(student, teacher, labels, mask, valid_columns, label_offset,
                                temperature, reverse, unit_sum);
    Tensor out = at::empty({student.size(0), kNumStatistics}, student.options().dtype(at::kFloat));
    const auto kernel = logit_kl_statistics_on_this_cpu(cpu_capability());
    float* const to = out.mutable_data_ptr<float>();
    share_out(student.size(0), 1,
              [&](int64_t begin, int64_t end) { kernel(args, begin, end, to); });
    return out;
}

std::tuple<Tensor, Tensor> merge(const Tensor& gathered, const OptionalTensor& mask,
                                 double temperature) {
    const auto [data, ranks, tokens, read] = merge_arguments(gathered, mask);
    const auto* const from = reinterpret_cast<const KLStatistics*>(data);
    const float tau = static_cast<float>(temperature);
    Tensor losses = at::empty({kNumLosses, tokens}, gathered.options());
    Tensor merged = at::empty({tokens, kNumStatistics}, gathered.options());
    float* const loss = losses.mutable_data_ptr<float>();
    auto* const to = reinterpret_cast<KLStatistics*>(merged.mutable_data_ptr<float>());
    for (int64_t token = 0; token < tokens; ++token) {
        KLStatistics r = from[token];
        for (int64_t rank = 1; rank < ranks; ++rank) {
            r = kl_merge(r, from[rank * tokens + token], tau);
        }
        to[token] = r;
        const KLLosses l = read && !read[token] ? KLLosses{0.f, 0.f, 0.f, 0.f} : kl_losses(r);
        loss[token] = l.forward_kl;
        loss[tokens + token] = l.reverse_kl;
        loss[2 * tokens + token] = l.cross_entropy;
        loss[3 * tokens + token] = l.z_loss;
    }
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
    const auto kernel = logit_kl_gradient_on_this_cpu(cpu_capability());
    share_out(student.size(0), 1,
              [&](int64_t begin, int64_t end) { kernel(args, to, from, begin, end); });
}

Tensor fused(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels,
             const OptionalTensor& mask, const Tensor& weights, int64_t valid_columns,
             double temperature, bool reverse, bool unit_sum, Tensor destination) {
    const auto args =
        arguments(student, teacher, labels, mask, valid_columns, 0, temperature, reverse, unit_sum);
    const auto to = gradient_to(destination, student, weights);
    Tensor out = at::empty({student.size(0), kNumStatistics}, student.options().dtype(at::kFloat));
    const auto kernel = logit_kl_fused_on_this_cpu(cpu_capability());
    float* const statistics = out.mutable_data_ptr<float>();
    share_out(student.size(0), 1, [&](int64_t begin, int64_t end) {
        float* const scratch = scratch_of_thread<float>(logit_kl_scratch(valid_columns));
        kernel(args, to, statistics, scratch, begin, end);
    });
    return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(minitron, CPU, m) {
    m.impl("logit_kl_statistics", &statistics);
    m.impl("logit_kl_merge", &merge);
    m.impl("logit_kl_gradient", &gradient);
    m.impl("logit_kl_fused", &fused);
}

}  // namespace minitron
