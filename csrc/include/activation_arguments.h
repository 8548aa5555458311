// Arguments of the kernels over activations, on any device.

#pragma once

#include <cstdint>

namespace minitron {

constexpr int kNumActivationStats = 4;

struct Activations {
    const void* data;  // [rows, columns], contiguous
    int64_t rows, columns;
    int64_t group;  // columns whose L2 norm stands for them; 1 for the columns themselves
    bool bfloat16;
};

constexpr float kSmallestNorm = 1e-8f;  // torch.nn.functional.cosine_similarity's eps

}  // namespace minitron
