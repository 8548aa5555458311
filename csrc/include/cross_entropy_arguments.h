// Arguments of the kernels that take a student's logits and labels alone, on any device.

#pragma once

#include <cstdint>

#include "logit_kl_arguments.h"

namespace minitron {

constexpr int kNumCrossEntropyStatistics = 3;

struct CrossEntropyArguments {
    LogitRows logits;
    int64_t tokens;
    int64_t columns, padding;  // as in LogitKLArguments
    const int64_t* labels;     // [tokens] ids in the whole vocabulary
    int64_t label_offset;      // id of the first column
};

}  // namespace minitron
