// The ops of minitron/ops/divergences.py and logit_moments.py on CPU tensors.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../cpu/divergences.h"
#include "../cpu/logit_moments.h"
#include "objectives_check.h"
#include "parallel.h"

namespace minitron {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor sums(const Tensor& student, const Tensor& teacher, const OptionalTensor& mask,
            const Tensor& merged, std::string kind, double parameter, int64_t valid_columns,
            double temperature) {
    const int64_t tokens = student.size(0);
    const auto args = divergence_arguments(arguments(student, teacher, std::nullopt, mask,
                                                     valid_columns, 0, temperature, false, false),
                                           kind, parameter, merged, tokens);
    Tensor out = at::empty({2, tokens}, merged.options());
    float* const to = out.mutable_data_ptr<float>();
    const auto kernel = divergence_sums_on_this_cpu(cpu_capability());
    share_out(tokens, 1,
              [&](int64_t begin, int64_t end) { kernel(args, begin, end, to, to + tokens); });
    return out;
}

void gradient(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels,
              const OptionalTensor& mask, const Tensor& merged, const Tensor& mean_slope,
              const Tensor& weights, std::string kind, double parameter, int64_t valid_columns,
              int64_t offset, double temperature, Tensor destination) {
    const int64_t tokens = student.size(0);
    const auto args = divergence_arguments(
        arguments(student, teacher, labels, mask, valid_columns, offset, temperature, false, false),
        kind, parameter, merged, tokens);
    const DivergenceGradient to = {gradient_to(destination, student, weights, 2),
                                   checked<float>(mean_slope, {tokens}, "mean_slope")};
    const auto kernel = divergence_gradient_on_this_cpu(cpu_capability());
    share_out(tokens, 1, [&](int64_t begin, int64_t end) { kernel(args, to, begin, end); });
}

Tensor moments(const Tensor& student, const Tensor& teacher, const OptionalTensor& mask,
               int64_t valid_columns) {
    const auto args =
        arguments(student, teacher, std::nullopt, mask, valid_columns, 0, 1, false, false);
    Tensor out = at::empty({student.size(0), kNumMoments}, student.options().dtype(at::kFloat));
    float* const to = out.mutable_data_ptr<float>();
    const auto kernel = logit_moments_on_this_cpu(cpu_capability());
    share_out(student.size(0), 1,
              [&](int64_t begin, int64_t end) { kernel(args, begin, end, to); });
    return out;
}

void moments_gradient(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels,
                      const OptionalTensor& mask, const Tensor& normalizers,
                      const Tensor& coefficients, const Tensor& by_cross_entropy,
                      int64_t valid_columns, int64_t offset, Tensor destination) {
    const auto args =
        arguments(student, teacher, labels, mask, valid_columns, offset, 1, false, false);
    const auto to = moments_gradient_to(destination, student, labels, normalizers, coefficients,
                                        by_cross_entropy);
    const auto kernel = logit_moments_gradient_on_this_cpu(cpu_capability());
    share_out(student.size(0), 1,
              [&](int64_t begin, int64_t end) { kernel(args, to, begin, end); });
}

}  // namespace

TORCH_LIBRARY_IMPL(minitron, CPU, m) {
    m.impl("divergence_sums", &sums);
    m.impl("divergence_gradient", &gradient);
    m.impl("logit_moments", &moments);
    m.impl("logit_moments_gradient", &moments_gradient);
}

}  // namespace minitron
