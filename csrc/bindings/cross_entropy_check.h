// From the tensors that the ops of minitron/ops/cross_entropy.py get to the arguments of kernels.

#pragma once

#include "cross_entropy_arguments.h"
#include "logit_kl_check.h"

namespace minitron {

inline CrossEntropyArguments cross_entropy_arguments(const Tensor& logits, const Tensor& labels,
                                                     int64_t valid_columns, int64_t label_offset) {
    const LogitRows rows = rows_of(logits, "logits");
    check_valid_columns(logits, valid_columns);
    const int64_t tokens = logits.size(0);
    return {rows,
            tokens,
            valid_columns,
            logits.size(1) - valid_columns,
            checked<int64_t>(labels, {tokens}, "labels"),
            label_offset};
}

}  // namespace minitron
