// The CPU kernels of csrc/cpu/logit_moments.cpp; each works on the rows [begin, end).

#pragma once

#include "dispatch.h"
#include "objective_arguments.h"

namespace minitron {

// One read of both logits: moments [tokens, 6].
MINITRON_CPU_KERNEL(logit_moments, void logit_moments(const LogitKLArguments&, int64_t begin,
                                                      int64_t end, float* moments))

// The gradient by the student's logits, of a distance and of the cross-entropy.
MINITRON_CPU_KERNEL(logit_moments_gradient, void logit_moments_gradient(const LogitKLArguments&,
                                                                        const LogitMomentsGradient&,
                                                                        int64_t begin, int64_t end))

}  // namespace minitron
