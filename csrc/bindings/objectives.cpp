// The ops of minitron/ops/divergences.py, logit_moments.py, sparse_kl.py and top_tokens.py on CPU
// tensors.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../cpu/divergences.h"
#include "../cpu/logit_moments.h"
#include "../cpu/sparse_kl.h"
#include "../cpu/top_tokens.h"
#include "objectives_check.h"
#include "parallel.h"

namespace minitron {
namespace {

Tensor sums(const Tensor& student, const Tensor& teacher, const OptionalTensor& mask,
            const Tensor& merged, std::string kind, double parameter, int64_t valid_columns,
            double temperature) {
    const auto args = divergence_arguments(student, teacher, std::nullopt, mask, merged, kind,
                                           parameter, valid_columns, 0, temperature);
    const int64_t tokens = student.size(0);
    Tensor out = new_divergence_sums(merged);
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
    const auto args = divergence_arguments(student, teacher, labels, mask, merged, kind, parameter,
                                           valid_columns, offset, temperature);
    const auto to = divergence_gradient_to(destination, student, weights, mean_slope);
    const auto kernel = divergence_gradient_on_this_cpu(cpu_capability());
    share_out(student.size(0), 1,
              [&](int64_t begin, int64_t end) { kernel(args, to, begin, end); });
}

Tensor moments(const Tensor& student, const Tensor& teacher, const OptionalTensor& mask,
               int64_t valid_columns) {
    const auto args = moments_arguments(student, teacher, std::nullopt, mask, valid_columns, 0);
    Tensor out = new_moments(student);
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
    const auto args = moments_arguments(student, teacher, labels, mask, valid_columns, offset);
    const auto to = moments_gradient_to(destination, student, labels, normalizers, coefficients,
                                        by_cross_entropy);
    const auto kernel = logit_moments_gradient_on_this_cpu(cpu_capability());
    share_out(student.size(0), 1,
              [&](int64_t begin, int64_t end) { kernel(args, to, begin, end); });
}

Tensor sparse_statistics(const Tensor& student, const Tensor& ids, const Tensor& weights,
                         const OptionalTensor& labels, const OptionalTensor& mask,
                         int64_t valid_columns, int64_t offset, double temperature) {
    const auto args = sparse_kl_arguments(student, ids, weights, labels, mask, valid_columns,
                                          offset, temperature);
    Tensor out = new_sparse_kl_statistics(student);
    float* const to = out.mutable_data_ptr<float>();
    const auto kernel = sparse_kl_statistics_on_this_cpu(cpu_capability());
    share_out(args.tokens, 1, [&](int64_t begin, int64_t end) {
        auto* const scratch = scratch_of_thread<KnownLanes>(sparse_kl_vectors(args.columns));
        kernel(args, begin, end, to, scratch);
    });
    return out;
}

void sparse_gradient(const Tensor& student, const Tensor& ids, const Tensor& weights,
                     const OptionalTensor& labels, const OptionalTensor& mask, const Tensor& merged,
                     const Tensor& upstream, int64_t valid_columns, int64_t offset,
                     double temperature, Tensor destination) {
    const auto args = sparse_kl_arguments(student, ids, weights, labels, mask, valid_columns,
                                          offset, temperature);
    const auto to = gradient_to(destination, student, upstream, 2);
    const float* const from = merged_sparse_kl(merged, student);
    const auto kernel = sparse_kl_gradient_on_this_cpu(cpu_capability());
    share_out(args.tokens, 1, [&](int64_t begin, int64_t end) {
        kernel(args, to, from, begin, end, scratch_of_thread<float>(args.known + 16));
    });
}

Tensor candidates(const Tensor& rows, const OptionalTensor& mask, int64_t k, int64_t valid_columns,
                  int64_t offset, double temperature) {
    const auto args = top_tokens_arguments(rows, mask, k, valid_columns, offset, temperature);
    Tensor out = new_candidates(args, rows);
    float* const to = out.mutable_data_ptr<float>();
    const auto kernel = top_candidates_on_this_cpu(cpu_capability());
    share_out(args.tokens, 1, [&](int64_t begin, int64_t end) {
        kernel(args, begin, end, to, scratch_of_thread<float>(top_tokens_scratch(args.columns)));
    });
    return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(minitron, CPU, m) {
    m.impl("divergence_sums", &sums);
    m.impl("divergence_gradient", &gradient);
    m.impl("logit_moments", &moments);
    m.impl("logit_moments_gradient", &moments_gradient);
    m.impl("sparse_kl_statistics", &sparse_statistics);
    m.impl("sparse_kl_gradient", &sparse_gradient);
    m.impl("top_candidates", &candidates);
}

}  // namespace minitron
