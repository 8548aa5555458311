// The CUDA kernels, as plain C++ functions: nothing here, nor where they are defined, knows torch.
//
// All pointers are to memory of the current device; `stream` is a cudaStream_t of it. Nothing waits
// for the device. What is returned is null, or why a kernel could not be launched.

#pragma once

#include <cstdint>

#include "activation_arguments.h"
#include "cross_entropy_arguments.h"
#include "logit_kl_arguments.h"
#include "objective_arguments.h"

namespace minitron::cuda {

// One read of both logits: statistics [tokens, 8].
const char* logit_kl_statistics(const LogitKLArguments&, int64_t tokens, float* statistics,
                                void* stream);

// Losses [kNumLosses, tokens] and merged statistics [tokens, 8] of all ranks' [ranks, tokens, 8].
const char* logit_kl_merge(const float* gathered, int64_t ranks, int64_t tokens, const bool* mask,
                           float temperature, float* losses, float* merged, void* stream);

// The gradient by the student's logits, from the statistics over the whole vocabulary.
const char* logit_kl_gradient(const LogitKLArguments&, const LogitKLGradient&, const float* merged,
                              void* stream);

// Statistics and gradient of a vocabulary that is whole here.
const char* logit_kl_fused(const LogitKLArguments&, const LogitKLGradient&, float* statistics,
                           void* stream);

// The statistics m, a and l of minitron/ops/cross_entropy.py, [tokens, 3].
const char* cross_entropy_statistics(const CrossEntropyArguments&, float* statistics, void* stream);

// The gradient by the logits, [tokens, columns + padding] of their dtype, contiguous, from the
// statistics over the whole vocabulary; `weights` [tokens].
const char* cross_entropy_gradient(const CrossEntropyArguments&, const float* merged,
                                   const float* weights, void* out, void* stream);

// Σ f and Σ p ∂f/∂p of minitron/ops/divergences.py, [2, tokens], from one read of both logits.
const char* divergence_sums(const DivergenceArguments&, int64_t tokens, float* sums, void* stream);

// The gradient by the student's logits.
const char* divergence_gradient(const DivergenceArguments&, const DivergenceGradient&,
                                void* stream);

// The moments of minitron/ops/logit_moments.py, [tokens, 6], from one read of both logits.
const char* logit_moments(const LogitKLArguments&, int64_t tokens, float* moments, void* stream);

// The gradient by the student's logits.
const char* logit_moments_gradient(const LogitKLArguments&, const LogitMomentsGradient&,
                                   void* stream);

// The statistics of minitron/ops/sparse_kl.py, [tokens, 7], from one read of the student's logits.
const char* sparse_kl_statistics(const SparseKLArguments&, float* statistics, void* stream);

// The gradient by the student's logits, from the merged [tokens, 6]; its weights are [2, tokens],
// of the KL and the cross-entropy. The scratch memory holds [tokens, known] floats.
const char* sparse_kl_gradient(const SparseKLArguments&, const LogitKLGradient&,
                               const float* merged, float* scratch, void* stream);

// What minitron/ops/top_tokens.py has every rank put forward, [tokens, 2 + 2 slots].
const char* top_candidates(const TopTokensArguments&, float* out, void* stream);

// Σ|x|, Σx², Σx and max|x| over the rows: `out` [4, columns / group]. The scratch memory holds
// activation_stats_scratch(x) floats.
int64_t activation_stats_scratch(const Activations&);
const char* activation_stats(const Activations&, float* scratch, double* out, void* stream);

// Cosines between the rows of two arrays of the same shape and type.
const char* block_cosine(const Activations& before, const void* after, float* out, void* stream);

}  // namespace minitron::cuda
