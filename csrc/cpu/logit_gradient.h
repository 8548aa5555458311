// What the gradients of losses between two models' logits share; compiled once per instruction set.

#pragma once

#include "logit_rows.h"

namespace minitron {
namespace CPU_CAPABILITY {

// Calls f(student, teacher) with values of the types of the logits.
template <typename F>
void by_dtype(const LogitKLArguments& args, const F& f) {
    const auto by_teacher = [&](auto student) {
        if (args.teacher.dtype == Dtype::kFloat32)
            f(student, float());
        else
            f(student, BFloat16());
    };
    if (args.student.dtype == Dtype::kFloat32)
        by_teacher(float());
    else
        by_teacher(BFloat16());
}

// A row of a gradient: f(s, t) less `lambda` at the row's label, both before rounding, and zeros in
// the padding. `to` may be `s` or `t`.
template <typename S, typename T, typename F>
void map_row_with_label(const S* s, const T* t, S* to, const LogitKLArguments& args, float lambda,
                        int64_t row, const F& f) {
    const int64_t column = lambda == 0.f ? -1 : args.labels[row] - args.label_offset;
    const bool here = column >= 0 && column < args.columns;
    alignas(64) float at_label[kLanes];
    if (here) {  // before the logits may be overwritten
        f(Vec(static_cast<float>(s[column])), Vec(static_cast<float>(t[column]))).store(at_label);
    }
    map_row(s, t, to, args.columns, f);
    if (here) to[column] = static_cast<S>(at_label[0] - lambda);
    zero(to + args.columns, args.padding);
}

}  // namespace CPU_CAPABILITY
}  // namespace minitron
