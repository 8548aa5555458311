// The CPU kernels of csrc/cpu/activation_stats.cpp and csrc/cpu/block_cosine.cpp.

#pragma once

#include <cstdint>

#include "dispatch.h"

namespace minitron {

constexpr int64_t kColumnBlock = 64;  // columns that are not shared out among threads
constexpr int kNumActivationStats = 4;

struct Activations {
    const void* data;  // [rows, columns], contiguous
    int64_t rows, columns;
    int64_t group;  // columns whose L2 norm stands for them; 1 for the columns themselves
    bool bfloat16;
};

// Σ|x|, Σx², Σx and max|x| over the rows: `out` [4, columns / group], for the blocks [begin, end)
// of kColumnBlock columns, or of one group each where there are groups.
MINITRON_CPU_KERNEL(activation_stats, void activation_stats(const Activations&, int64_t begin,
                                                            int64_t end, double* out))

// Cosines of the rows [begin, end) of two arrays of the same shape and type.
MINITRON_CPU_KERNEL(block_cosine, void block_cosine(const Activations& before, const void* after,
                                                    int64_t begin, int64_t end, float* out))

}  // namespace minitron
