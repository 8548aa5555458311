// The ops of minitron/ops/divergences.py, logit_moments.py, sparse_kl.py and top_tokens.py on CUDA
// tensors.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>

#include "../cuda/kernels.h"
#include "objectives_check.h"
#include "stream.h"

namespace minitron {
namespace {

Tensor sums(const Tensor& student, const Tensor& teacher, const OptionalTensor& mask,
            const Tensor& merged, std::string kind, double parameter, int64_t valid_columns,
            double temperature) {
    const auto args = divergence_arguments(student, teacher, std::nullopt, mask, merged, kind,
                                           parameter, valid_columns, 0, temperature);
    const OnDevice device(student, {&teacher, pointer(mask), &merged});
    Tensor out = new_divergence_sums(merged);
    check_launch(cuda::divergence_sums(args, student.size(0), out.mutable_data_ptr<float>(),
                                       device.stream()),
                 "divergence_sums");
    return out;
}

void gradient(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels,
              const OptionalTensor& mask, const Tensor& merged, const Tensor& mean_slope,
              const Tensor& weights, std::string kind, double parameter, int64_t valid_columns,
              int64_t offset, double temperature, Tensor destination) {
    const auto args = divergence_arguments(student, teacher, labels, mask, merged, kind, parameter,
                                           valid_columns, offset, temperature);
    const auto to = divergence_gradient_to(destination, student, weights, mean_slope);
    const OnDevice device(student, {&teacher, pointer(labels), pointer(mask), &merged, &mean_slope,
                                    &weights, &destination});
    check_launch(cuda::divergence_gradient(args, to, device.stream()), "divergence_gradient");
}

Tensor moments(const Tensor& student, const Tensor& teacher, const OptionalTensor& mask,
               int64_t valid_columns) {
    const auto args = moments_arguments(student, teacher, std::nullopt, mask, valid_columns, 0);
    const OnDevice device(student, {&teacher, pointer(mask)});
    Tensor out = new_moments(student);
    check_launch(
        cuda::logit_moments(args, student.size(0), out.mutable_data_ptr<float>(), device.stream()),
        "logit_moments");
    return out;
}

void moments_gradient(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels,
                      const OptionalTensor& mask, const Tensor& normalizers,
                      const Tensor& coefficients, const Tensor& by_cross_entropy,
                      int64_t valid_columns, int64_t offset, Tensor destination) {
    const auto args = moments_arguments(student, teacher, labels, mask, valid_columns, offset);
    const auto to = moments_gradient_to(destination, student, labels, normalizers, coefficients,
                                        by_cross_entropy);
    const OnDevice device(student, {&teacher, pointer(labels), pointer(mask), &normalizers,
                                    &coefficients, &by_cross_entropy, &destination});
    check_launch(cuda::logit_moments_gradient(args, to, device.stream()), "logit_moments_gradient");
}

Tensor sparse_statistics(const Tensor& student, const Tensor& ids, const Tensor& weights,
                         const OptionalTensor& labels, const OptionalTensor& mask,
                         int64_t valid_columns, int64_t offset, double temperature) {
    const auto args = sparse_kl_arguments(student, ids, weights, labels, mask, valid_columns,
                                          offset, temperature);
    const OnDevice device(student, {&ids, &weights, pointer(labels), pointer(mask)});
    Tensor out = new_sparse_kl_statistics(student);
    check_launch(cuda::sparse_kl_statistics(args, out.mutable_data_ptr<float>(), device.stream()),
                 "sparse_kl_statistics");
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
    const OnDevice device(student, {&ids, &weights, pointer(labels), pointer(mask), &merged,
                                    &upstream, &destination});
    Tensor scratch = at::empty({args.tokens, args.known}, weights.options());
    check_launch(cuda::sparse_kl_gradient(args, to, from, scratch.mutable_data_ptr<float>(),
                                          device.stream()),
                 "sparse_kl_gradient");
}

Tensor candidates(const Tensor& rows, const OptionalTensor& mask, int64_t k, int64_t valid_columns,
                  int64_t offset, double temperature) {
    const auto args = top_tokens_arguments(rows, mask, k, valid_columns, offset, temperature);
    const OnDevice device(rows, {pointer(mask)});
    Tensor out = new_candidates(args, rows);
    check_launch(cuda::top_candidates(args, out.mutable_data_ptr<float>(), device.stream()),
                 "top_candidates");
    return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(minitron, CUDA, m) {
    m.impl("divergence_sums", &sums);
    m.impl("divergence_gradient", &gradient);
    m.impl("logit_moments", &moments);
    m.impl("logit_moments_gradient", &moments_gradient);
    m.impl("sparse_kl_statistics", &sparse_statistics);
    m.impl("sparse_kl_gradient", &sparse_gradient);
    m.impl("top_candidates", &candidates);
}

}  // namespace minitron
