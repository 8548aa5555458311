// The CPU kernel of csrc/cpu/top_tokens.cpp; works on the rows [begin, end).

#pragma once

#include "dispatch.h"
#include "objective_arguments.h"

namespace minitron {

constexpr int64_t top_tokens_scratch(int64_t columns) { return 2 * (columns + 16); }

// What a rank puts forward: candidates [tokens, 2 + 2 slots]. `scratch` holds
// top_tokens_scratch(columns) floats.
MINITRON_CPU_KERNEL(top_candidates, void top_candidates(const TopTokensArguments&, int64_t begin,
                                                        int64_t end, float* out, float* scratch))

}  // namespace minitron
