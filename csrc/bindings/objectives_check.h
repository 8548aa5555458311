// From the tensors that the ops of minitron/ops/divergences.py and logit_moments.py get to the
// arguments of their kernels.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
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

inline DivergenceArguments divergence_arguments(const LogitKLArguments& logits,
                                                const std::string& kind, double parameter,
                                                const Tensor& merged, int64_t tokens) {
    return {logits, divergence(kind), static_cast<float>(parameter),
            checked<float>(merged, {tokens, kNumStatistics}, "merged")};
}

inline LogitMomentsGradient moments_gradient_to(const Tensor& destination, const Tensor& student,
                                                const std::optional<Tensor>& labels,
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

}  // namespace minitron
