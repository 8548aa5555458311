// The CPU kernels of csrc/cpu/sparse_kl.cpp; each works on the rows [begin, end).

#pragma once

#include "dispatch.h"
#include "objective_arguments.h"

namespace minitron {

// For every vector of a row's logits, which of its lanes hold a known token.
using KnownLanes = uint16_t;
constexpr int64_t sparse_kl_vectors(int64_t columns) { return columns / 4 + 1; }  // or fewer

// One read of the logits: statistics [tokens, 7]. `scratch` holds sparse_kl_vectors(columns) words.
MINITRON_CPU_KERNEL(sparse_kl_statistics,
                    void sparse_kl_statistics(const SparseKLArguments&, int64_t begin, int64_t end,
                                              float* statistics, KnownLanes* scratch))

// The gradient by the student's logits, of the divergence and the cross-entropy. `scratch` holds
// `known` floats, up to a whole vector.
MINITRON_CPU_KERNEL(sparse_kl_gradient,
                    void sparse_kl_gradient(const SparseKLArguments&, const LogitKLGradient&,
                                            const float* merged, int64_t begin, int64_t end,
                                            float* scratch))

}  // namespace minitron
