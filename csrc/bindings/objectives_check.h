// From the tensors that the ops of minitron/ops/divergences.py, logit_moments.py, sparse_kl.py and
// top_tokens.py get to the arguments of their kernels.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <string>

#include "logit_kl_check.h"
#include "objective_arguments.h"

namespace minitron {

inline Divergence divergence(const std::string& kind) {
    if (kind == "jsd") return Divergence::kJSD;
    if (kind == "skew_kl") return Divergence::kSkewKL;
    if (kind == "skew_reverse_kl") return Divergence::kSkewReverseKL;
    TORCH_CHECK(kind == "tvd", "no divergence is called ", kind);
    return Divergence::kTVD;
}

inline DivergenceArguments divergence_arguments(const Tensor& student, const Tensor& teacher,
                                                const OptionalTensor& labels,
                                                const OptionalTensor& mask, const Tensor& merged,
                                                const std::string& kind, double parameter,
                                                int64_t valid_columns, int64_t label_offset,
                                                double temperature) {
    return {arguments(student, teacher, labels, mask, valid_columns, label_offset, temperature,
                      false, false),
            divergence(kind), static_cast<float>(parameter),
            checked<float>(merged, {student.size(0), kNumStatistics}, "merged")};
}

inline Tensor new_divergence_sums(const Tensor& merged) {
    return at::empty({2, merged.size(0)}, merged.options());
}

inline DivergenceGradient divergence_gradient_to(const Tensor& destination, const Tensor& student,
                                                 const Tensor& weights, const Tensor& mean_slope) {
    return {gradient_to(destination, student, weights, 2),
            checked<float>(mean_slope, {student.size(0)}, "mean_slope")};
}

inline LogitKLArguments moments_arguments(const Tensor& student, const Tensor& teacher,
                                          const OptionalTensor& labels, const OptionalTensor& mask,
                                          int64_t valid_columns, int64_t label_offset) {
    return arguments(student, teacher, labels, mask, valid_columns, label_offset, 1, false, false);
}

inline Tensor new_moments(const Tensor& student) {
    return at::empty({student.size(0), kNumMoments}, student.options().dtype(at::kFloat));
}

inline LogitMomentsGradient moments_gradient_to(const Tensor& destination, const Tensor& student,
                                                const OptionalTensor& labels,
                                                const Tensor& normalizers,
                                                const Tensor& coefficients,
                                                const Tensor& by_cross_entropy) {
    const int64_t tokens = student.size(0);
    return {
        gradient_to(destination, student, by_cross_entropy.unsqueeze(0), 1),
        reinterpret_cast<const LogitMomentsCoefficients*>(
            checked<float>(coefficients, {tokens, 4}, "coefficients")),
        labels ? checked<float>(normalizers, {tokens, kNumStatistics}, "normalizers") : nullptr};
}

inline SparseKLArguments sparse_kl_arguments(const Tensor& student, const Tensor& ids,
                                             const Tensor& weights, const OptionalTensor& labels,
                                             const OptionalTensor& mask, int64_t valid_columns,
                                             int64_t label_offset, double temperature) {
    check_valid_columns(student, valid_columns);
    check_temperature(temperature);
    const int64_t tokens = student.size(0), known = ids.size(1);
    return {.student = rows_of(student, "student"),
            .tokens = tokens,
            .columns = valid_columns,
            .padding = student.size(1) - valid_columns,
            .known = known,
            .ids = checked<int64_t>(ids, {tokens, known}, "ids"),
            .weights = checked<float>(weights, {tokens, known}, "weights"),
            .labels = labels ? checked<int64_t>(*labels, {tokens}, "labels") : nullptr,
            .label_offset = label_offset,
            .mask = mask ? checked<bool>(*mask, {tokens}, "mask") : nullptr,
            .temperature = static_cast<float>(temperature)};
}

inline Tensor new_sparse_kl_statistics(const Tensor& student) {
    return at::empty({student.size(0), kNumSparseKLStatistics},
                     student.options().dtype(at::kFloat));
}

inline const float* merged_sparse_kl(const Tensor& merged, const Tensor& student) {
    return checked<float>(merged, {student.size(0), kNumSparseKLMerged}, "merged");
}

inline TopTokensArguments top_tokens_arguments(const Tensor& rows, const OptionalTensor& mask,
                                               int64_t k, int64_t valid_columns, int64_t first_id,
                                               double temperature) {
    TORCH_CHECK(k >= 1, "k=", k, " must be at least 1");
    check_valid_columns(rows, valid_columns);
    check_temperature(temperature);
    const int64_t tokens = rows.size(0);
    return {.rows = rows_of(rows, "rows"),
            .tokens = tokens,
            .columns = valid_columns,
            .slots = std::min(k, rows.size(1)),
            .first_id = first_id,
            .mask = mask ? checked<bool>(*mask, {tokens}, "mask") : nullptr,
            .temperature = static_cast<float>(temperature)};
}

inline Tensor new_candidates(const TopTokensArguments& args, const Tensor& rows) {
    return at::empty({args.tokens, 2 + 2 * args.slots}, rows.options().dtype(at::kFloat));
}

}  // namespace minitron
