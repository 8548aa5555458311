// The CPU kernels of csrc/cpu/activation_stats.cpp and csrc/cpu/block_cosine.cpp.

#pragma once

#include <cstdint>

#include "activation_arguments.h"
#include "dispatch.h"

namespace minitron {

constexpr int64_t kColumnBlock = 64;  // columns that are not shared out among threads
// Σ|x|, Σx², Σx and max|x| over the rows: `out` [4, columns / group], for the blocks [begin, end)
// of kColumnBlock columns, or of one group each where there are groups.
MINITRON_CPU_KERNEL(activation_stats, void activation_stats(const Activations&, int64_t begin,
                                                            int64_t end, double* out))

// Cosines of the rows [begin, end) of two arrays of the same shape and type.
MINITRON_CPU_KERNEL(block_cosine, void block_cosine(const Activations& before, const void* after,
                                                    int64_t begin, int64_t end, float* out))

}  // namespace minitron
