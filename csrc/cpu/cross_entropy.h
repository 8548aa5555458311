// The CPU kernels of csrc/cpu/cross_entropy.cpp; each works on the rows [begin, end).

#pragma once

#include "cross_entropy_arguments.h"
#include "dispatch.h"

namespace minitron {

// One read of the logits: statistics [tokens, 3].
MINITRON_CPU_KERNEL(cross_entropy_statistics,
                    void cross_entropy_statistics(const CrossEntropyArguments&, int64_t begin,
                                                  int64_t end, float* statistics))

// The gradient [tokens, columns + padding], contiguous, of the losses times `weights` [tokens],
// from the statistics over the whole vocabulary. Rows of weight zero are not read.
MINITRON_CPU_KERNEL(cross_entropy_gradient,
                    void cross_entropy_gradient(const CrossEntropyArguments&,
                                                const float* statistics, const float* weights,
                                                void* gradient, int64_t begin, int64_t end))

}  // namespace minitron
