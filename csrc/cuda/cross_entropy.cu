// The sweeps of minitron/ops/cross_entropy.py, for GPUs: a row of logits to a block.

#include "common.cuh"
#include "kernels.h"
#include "kl_row.h"
#include "logit_rows.cuh"

namespace minitron::cuda {
namespace {

template <typename T>
__device__ RowReader<T> logits_row(const CrossEntropyArguments& args, int64_t row) {
    return {static_cast<const T*>(args.logits.data) + row * args.logits.stride,
            static_cast<int>(args.columns)};
}

// m, a and l of every row: `statistics` [tokens, 3].
template <typename T>
__global__ void __launch_bounds__(kMaxThreads, 2)
    statistics_kernel(const __grid_constant__ CrossEntropyArguments args, float* statistics) {
    const int64_t row = blockIdx.x;
    const auto logits = logits_row<T>(args, row);
    float m = kNoColumns, a = 0.f;
    for_each_piece<false>(logits, -INFINITY, [&](int, const Pack<T>& piece) {
        float x[kWidth];
        unpack(piece, x);
        float largest = m;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) largest = fmaxf(largest, x[i]);
        a *= kl_exp2((m - largest) * kLog2E);
        m = largest;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) a += kl_exp2((x[i] - m) * kLog2E);
    });
    float* const scratch = reinterpret_cast<float*>(shared_memory());
    float reference[1] = {m};
    reduce_block(reference, scratch, [](float x, float y) { return fmaxf(x, y); });
    float total[1] = {a * kl_weight(m - reference[0])};
    sum_over_block(total, scratch);
    if (threadIdx.x > 0) return;
    const int label = label_column(args.labels, row, args.label_offset, args.columns);
    float* const out = statistics + row * kNumCrossEntropyStatistics;
    out[0] = reference[0];
    out[1] = total[0];
    out[2] = label >= 0 ? widen(logits.data[label]) : 0.f;
}

// softmax − onehot(label), times the row's weight.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads, 2)
    gradient_kernel(const __grid_constant__ CrossEntropyArguments args, const float* merged,
                    const float* weights, T* out) {
    const int64_t row = blockIdx.x;
    const int columns = static_cast<int>(args.columns), padding = static_cast<int>(args.padding);
    const float m = merged[row * kNumCrossEntropyStatistics], weight = weights[row];
    const float scale = weight / merged[row * kNumCrossEntropyStatistics + 1];
    const int label = label_column(args.labels, row, args.label_offset, args.columns);
    T* const to = out + row * (args.columns + args.padding);
    const RowWriter<T> writer(to, columns);
    for_each_piece<true>(logits_row<T>(args, row), 0.f, [&](int index, const Pack<T>& piece) {
        float x[kWidth], slope[kWidth];
        unpack(piece, x);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) slope[i] = scale * kl_exp2((x[i] - m) * kLog2E);
        subtract_at_label(slope, index, label, weight);
        writer.store(index, slope);
    });
    zero(to, columns, columns + padding);
}

Grid row_grid(const CrossEntropyArguments& args) {
    const int threads = threads_for(args.columns);
    return {args.tokens, threads, threads / kWarp * sizeof(float)};
}

}  // namespace

const char* cross_entropy_statistics(const CrossEntropyArguments& args, float* statistics,
                                     void* stream) {
    const Grid grid = row_grid(args);
    return message(args.logits.dtype == Dtype::kFloat32
                       ? launch(statistics_kernel<float>, grid, stream, args, statistics)
                       : launch(statistics_kernel<BFloat16>, grid, stream, args, statistics));
}

const char* cross_entropy_gradient(const CrossEntropyArguments& args, const float* merged,
                                   const float* weights, void* out, void* stream) {
    const Grid grid = row_grid(args);
    if (args.logits.dtype == Dtype::kFloat32) {
        return message(launch(gradient_kernel<float>, grid, stream, args, merged, weights,
                              static_cast<float*>(out)));
    }
    return message(launch(gradient_kernel<BFloat16>, grid, stream, args, merged, weights,
                          static_cast<BFloat16*>(out)));
}

}  // namespace minitron::cuda
