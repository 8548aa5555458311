// Rows of logits: what the sweeps over them have in common.

#pragma once

#include "common.cuh"
#include "logit_kl_arguments.h"

namespace minitron::cuda {

template <typename S, typename T>
struct LogitReader {
    RowReader<S> student;
    RowReader<T> teacher;

    __device__ LogitReader(const LogitKLArguments& args, int64_t row)
        : student(static_cast<const S*>(args.student.data) + row * args.student.stride,
                  static_cast<int>(args.columns)),
          teacher(static_cast<const T*>(args.teacher.data) + row * args.teacher.stride,
                  static_cast<int>(args.columns)) {}
};

__device__ inline bool is_masked(const LogitKLArguments& args, int64_t row) {
    return args.mask && !args.mask[row];
}

// The label's column if it is among those here, −1 otherwise.
__device__ inline int label_column(const int64_t* labels, int64_t row, int64_t offset,
                                   int64_t columns) {
    if (!labels) return -1;
    const int64_t column = labels[row] - offset;
    return column >= 0 && column < columns ? static_cast<int>(column) : -1;
}

// Subtracts `amount` where a piece has the label's column.
__device__ inline void subtract_at_label(float (&piece)[kWidth], int index, int label,
                                         float amount) {
    if (label < 0 || label / kWidth != index) return;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) piece[i] -= label % kWidth == i ? amount : 0.f;
}

template <typename S>
__device__ S* gradient_row(const LogitKLGradient& out, int64_t row) {
    return static_cast<S*>(out.data) + row * out.stride;
}

// Calls f(S, T) for the dtypes of both.
template <typename F>
cudaError_t by_dtype(const LogitKLArguments& args, const F& f) {
    const auto by_teacher = [&](auto student) {
        return args.teacher.dtype == Dtype::kFloat32 ? f(student, float()) : f(student, BFloat16());
    };
    return args.student.dtype == Dtype::kFloat32 ? by_teacher(float()) : by_teacher(BFloat16());
}

}  // namespace minitron::cuda
