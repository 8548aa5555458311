// Arguments of the kernels of minitron/ops/divergences.py, logit_moments.py, sparse_kl.py and
// top_tokens.py, on any device.

#pragma once

#include "logit_kl_arguments.h"

namespace minitron {

enum class Divergence : int { kJSD, kSkewKL, kSkewReverseKL, kTVD };

struct DivergenceArguments {
    LogitKLArguments logits;
    Divergence kind;
    float parameter;      // β or α
    const float* merged;  // [tokens, 8] statistics of kl_merge.h over the whole vocabulary
};

struct DivergenceGradient {
    LogitKLGradient out;  // its weights are [2, tokens], of the divergence and the cross-entropy
    const float* mean_slope;  // [tokens] Σ p ∂f/∂p over the whole vocabulary
};

constexpr int kNumMoments = 6;

struct LogitMomentsCoefficients {
    float student_mean, teacher_mean;
    float by_student, by_teacher;  // what the gradient multiplies s′ and t′ by
};

struct LogitMomentsGradient {
    LogitKLGradient out;                           // its weights are [tokens], of the cross-entropy
    const LogitMomentsCoefficients* coefficients;  // [tokens]
    const float* normalizers;  // as DivergenceArguments' merged; null without labels
};

constexpr int kNumSparseKLStatistics = 7;

struct SparseKLArguments {
    LogitRows student;
    int64_t tokens;
    int64_t columns, padding;  // as in LogitKLArguments
    int64_t known;             // tokens that the teacher knows of each distribution
    const int64_t* ids;        // [tokens, known], −1 for none
    const float* weights;      // [tokens, known] their probabilities
    const int64_t* labels;     // [tokens], or null
    int64_t label_offset;      // id of the first column
    const bool* mask;          // [tokens] rows to read, or null for all
    float temperature;         // τ
};

constexpr int kNumSparseKLMerged = 6;

// Over the whole vocabulary, as minitron/ops/sparse_kl.py merges them.
struct SparseKLMerged {
    float m, total, off, unit, mass, rest;
};
static_assert(sizeof(SparseKLMerged) == kNumSparseKLMerged * sizeof(float));

struct TopTokensArguments {
    LogitRows rows;
    int64_t tokens, columns;
    int64_t slots;      // tokens wanted of each row, some of which stay empty if columns are fewer
    int64_t first_id;   // of the first column
    const bool* mask;   // [tokens] rows to read, or null for all
    float temperature;  // τ
};

}  // namespace minitron
