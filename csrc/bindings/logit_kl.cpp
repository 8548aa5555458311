// The ops of minitron/ops/logit_kl.py on CPU tensors.

#include "../cpu/logit_kl.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "check.h"
#include "parallel.h"

namespace minitron {
namespace {

using at::Tensor;

LogitRows rows_of(const Tensor& logits, const char* name) {
    TORCH_CHECK(logits.dim() == 2, name, " must be [tokens, columns], not ", logits.sizes());
    TORCH_CHECK(logits.size(1) <= 1 || logits.stride(1) == 1, name, " needs unit column stride");
    const bool wide = logits.scalar_type() == at::kFloat;
    TORCH_CHECK(wide || logits.scalar_type() == at::kBFloat16, name, " must be fp32 or bf16, not ",
                logits.scalar_type());
    return {logits.const_data_ptr(), logits.stride(0), wide ? Dtype::kFloat32 : Dtype::kBFloat16};
}

LogitKLArguments arguments(const Tensor& student, const Tensor& teacher,
                           const std::optional<Tensor>& labels, const std::optional<Tensor>& mask,
                           int64_t valid_columns, int64_t label_offset, double temperature,
                           bool reverse, bool unit_sum) {
    TORCH_CHECK(student.sizes() == teacher.sizes(), "student ", student.sizes(), " and teacher ",
                teacher.sizes(), " differ");
    TORCH_CHECK(0 <= valid_columns && valid_columns <= student.size(1),
                "valid_columns=", valid_columns, " of ", student.size(1));
    TORCH_CHECK(temperature > 0, "temperature=", temperature, " must be positive");
    const int64_t tokens = student.size(0);
    return {.student = rows_of(student, "student"),
            .teacher = rows_of(teacher, "teacher"),
            .columns = valid_columns,
            .padding = student.size(1) - valid_columns,
            .labels = labels ? checked<int64_t>(*labels, {tokens}, "labels") : nullptr,
            .label_offset = label_offset,
            .mask = mask ? checked<bool>(*mask, {tokens}, "mask") : nullptr,
            .temperature = static_cast<float>(temperature),
            .reverse = reverse,
            .unit_sum = unit_sum && temperature != 1};
}

LogitKLGradient gradient_to(const Tensor& destination, const Tensor& student,
                            const Tensor& weights) {
    TORCH_CHECK(destination.sizes() == student.sizes() &&
                    destination.scalar_type() == student.scalar_type(),
                "destination must have the shape and dtype of student");
    TORCH_CHECK(destination.size(1) <= 1 || destination.stride(1) == 1,
                "destination needs unit column stride");
    const int64_t tokens = student.size(0);
    return {destination.mutable_data_ptr(), destination.stride(0),
            checked<float>(weights, {kNumLosses, tokens}, "weights"), tokens};
}

Tensor statistics(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& labels,
                  const std::optional<Tensor>& mask, int64_t valid_columns, int64_t label_offset,
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

std::tuple<Tensor, Tensor> merge(const Tensor& gathered, const std::optional<Tensor>& mask,
                                 double temperature) {
    TORCH_CHECK(gathered.dim() == 3, "gathered must be [t, tokens, 8], not ", gathered.sizes());
    const int64_t ranks = gathered.size(0), tokens = gathered.size(1);
    const auto* const from = reinterpret_cast<const KLStatistics*>(
        checked<float>(gathered, {ranks, tokens, kNumStatistics}, "gathered"));
    const bool* const read = mask ? checked<bool>(*mask, {tokens}, "mask") : nullptr;
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

void gradient(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& labels,
              const std::optional<Tensor>& mask, const Tensor& merged, const Tensor& weights,
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

Tensor fused(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& labels,
             const std::optional<Tensor>& mask, const Tensor& weights, int64_t valid_columns,
             double temperature, bool reverse, bool unit_sum, Tensor destination) {
    const auto args =
        arguments(student, teacher, labels, mask, valid_columns, 0, temperature, reverse, unit_sum);
    const auto to = gradient_to(destination, student, weights);
    Tensor out = at::empty({student.size(0), kNumStatistics}, student.options().dtype(at::kFloat));
    const auto kernel = logit_kl_fused_on_this_cpu(cpu_capability());
    float* const statistics = out.mutable_data_ptr<float>();
    share_out(student.size(0), 1, [&](int64_t begin, int64_t end) {
        // Kept between calls: fresh memory of this size would be mapped, and faulted in, again.
        thread_local std::vector<float> scratch;
        const size_t size = logit_kl_scratch(valid_columns);
        if (scratch.size() < size) scratch.resize(size);
        kernel(args, to, statistics, scratch.data(), begin, end);
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
