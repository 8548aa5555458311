// The CPU kernels of csrc/cpu/divergences.cpp; each works on the rows [begin, end).

#pragma once

#include "dispatch.h"
#include "objective_arguments.h"

namespace minitron {

// A second read of both logits: Σ f and Σ p ∂f/∂p, each [tokens].
MINITRON_CPU_KERNEL(divergence_sums, void divergence_sums(const DivergenceArguments&, int64_t begin,
                                                          int64_t end, float* terms, float* slopes))

// The gradient by the student's logits.
MINITRON_CPU_KERNEL(divergence_gradient,
                    void divergence_gradient(const DivergenceArguments&, const DivergenceGradient&,
                                             int64_t begin, int64_t end))

}  // namespace minitron
