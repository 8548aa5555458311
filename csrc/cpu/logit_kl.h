// The CPU kernels of csrc/cpu/logit_kl.cpp; each works on the rows [begin, end).

#pragma once

#include "dispatch.h"
#include "logit_kl_arguments.h"

namespace minitron {

constexpr int64_t kTile = 4096;  // columns of both logits, in fp32, that fit a first-level cache

// Two rows, each up to a whole vector, and two maxima a tile.
constexpr int64_t logit_kl_scratch(int64_t columns) {
    return 2 * (columns + 16) + 2 * (columns / kTile + 1);
}

// One read of both logits: statistics [tokens, 8].
MINITRON_CPU_KERNEL(logit_kl_statistics,
                    void logit_kl_statistics(const LogitKLArguments&, int64_t begin, int64_t end,
                                             float* statistics))

// The gradient by the student's logits, from the statistics over the whole vocabulary.
MINITRON_CPU_KERNEL(logit_kl_gradient,
                    void logit_kl_gradient(const LogitKLArguments&, const LogitKLGradient&,
                                           const float* statistics, int64_t begin, int64_t end))

// Both for a vocabulary that is whole here, row by row while the row is in the cache. `scratch`
// holds logit_kl_scratch(columns) floats.
MINITRON_CPU_KERNEL(logit_kl_fused, void logit_kl_fused(const LogitKLArguments&,
                                                        const LogitKLGradient&, float* statistics,
                                                        float* scratch, int64_t begin, int64_t end))

}  // namespace minitron
