// Arguments of the kernels over a student's and a teacher's logits, on any device.

#pragma once

#include <cstdint>

#include "kl_merge.h"

namespace minitron {

enum class Dtype : int { kFloat32, kBFloat16 };

struct LogitRows {
    const void* data;  // [tokens, >= columns], unit column stride
    int64_t stride;    // elements between rows
    Dtype dtype;
};

struct LogitKLArguments {
    LogitRows student, teacher;
    int64_t columns;        // that stand for a token; the rest is padding and never read
    int64_t padding;        // columns after them that get a gradient of zero
    const int64_t* labels;  // [tokens] ids in the whole vocabulary, or null
    int64_t label_offset;   // id of the first column
    const bool* mask;       // [tokens] rows to read, or null for all
    float temperature;      // τ
    bool reverse;           // also what reverse KL needs
    bool unit_sum;          // also Σ e^s, where τ ≠ 1
};

struct LogitKLGradient {
    void* data;  // [tokens, columns + padding] of the student's dtype; may be the logits themselves
    int64_t stride;
    const float* weights;  // [losses, tokens] gradient of the final loss by each token's losses
    int64_t tokens;
};

}  // namespace minitron
