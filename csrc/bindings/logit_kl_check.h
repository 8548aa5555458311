// From the tensors that the ops of minitron/ops/logit_kl.py get to the arguments of their kernels.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "check.h"
#include "logit_kl_arguments.h"

namespace minitron {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline LogitRows rows_of(const Tensor& logits, const char* name) {
    TORCH_CHECK(logits.dim() == 2, name, " must be [tokens, columns], not ", logits.sizes());
    TORCH_CHECK(logits.size(1) <= 1 || logits.stride(1) == 1, name, " needs unit column stride");
    const bool wide = logits.scalar_type() == at::kFloat;
    TORCH_CHECK(wide || logits.scalar_type() == at::kBFloat16, name, " must be fp32 or bf16, not ",
                logits.scalar_type());
    return {logits.const_data_ptr(), logits.stride(0), wide ? Dtype::kFloat32 : Dtype::kBFloat16};
}

inline void check_valid_columns(const Tensor& logits, int64_t valid_columns) {
    TORCH_CHECK(0 <= valid_columns && valid_columns <= logits.size(1),
                "valid_columns=", valid_columns, " of ", logits.size(1));
}

inline void check_temperature(double temperature) {
    TORCH_CHECK(temperature > 0, "temperature=", temperature, " must be positive");
}

inline LogitKLArguments arguments(const Tensor& student, const Tensor& teacher,
                                  const OptionalTensor& labels, const OptionalTensor& mask,
                                  int64_t valid_columns, int64_t label_offset, double temperature,
                                  bool reverse, bool unit_sum) {
    TORCH_CHECK(student.sizes() == teacher.sizes(), "student ", student.sizes(), " and teacher ",
                teacher.sizes(), " differ");
    check_valid_columns(student, valid_columns);
    check_temperature(temperature);
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

struct MergeArguments {
    const float* gathered;  // [ranks, tokens, 8]
    int64_t ranks, tokens;
    const bool* mask;  // [tokens], or null
};

inline MergeArguments merge_arguments(const Tensor& gathered, const OptionalTensor& mask) {
    TORCH_CHECK(gathered.dim() == 3, "gathered must be [t, tokens, 8], not ", gathered.sizes());
    const int64_t ranks = gathered.size(0), tokens = gathered.size(1);
    return {checked<float>(gathered, {ranks, tokens, kNumStatistics}, "gathered"), ranks, tokens,
            mask ? checked<bool>(*mask, {tokens}, "mask") : nullptr};
}

inline LogitKLGradient gradient_to(const Tensor& destination, const Tensor& student,
                                   const Tensor& weights, int64_t losses = kNumLosses) {
    TORCH_CHECK(destination.sizes() == student.sizes() &&
                    destination.scalar_type() == student.scalar_type(),
                "destination must have the shape and dtype of student");
    TORCH_CHECK(destination.size(1) <= 1 || destination.stride(1) == 1,
                "destination needs unit column stride");
    const int64_t tokens = student.size(0);
    return {destination.mutable_data_ptr(), destination.stride(0),
            checked<float>(weights, {losses, tokens}, "weights"), tokens};
}

}  // namespace minitron
