// The sweeps of minitron/ops/sparse_kl.py, for GPUs: a row of logits to a block.
//
// One bit a column in shared memory says which of them the teacher knows. The gradient is first
// written as if it knew none; what it knows is then written over it, from logits read before.

#include "kernels.h"
#include "kl_row.h"
#include "logit_rows.cuh"

namespace minitron::cuda {
namespace {

constexpr int kSums = 5;
constexpr int kScratchFloats = kMaxThreads / kWarp * kSums;

template <typename T>
__device__ RowReader<T> logits_row(const SparseKLArguments& args, int64_t row) {
    return {static_cast<const T*>(args.student.data) + row * args.student.stride,
            static_cast<int>(args.columns)};
}

// The column of the row's i-th known token, −1 if it has none here.
__device__ int known_column(const SparseKLArguments& args, int64_t row, int i) {
    const int64_t id = args.ids[row * args.known + i], column = id - args.label_offset;
    return id >= 0 && column >= 0 && column < args.columns ? static_cast<int>(column) : -1;
}

// The seven statistics of the columns here: `out` [tokens, 7].
template <typename T>
__global__ void __launch_bounds__(kMaxThreads, 2)
    statistics_kernel(const __grid_constant__ SparseKLArguments args, float* out) {
    const int64_t row = blockIdx.x;
    out += row * kNumSparseKLStatistics;
    if (args.mask && !args.mask[row]) {
        if (threadIdx.x < kNumSparseKLStatistics) out[threadIdx.x] = threadIdx.x ? 0.f : kNoColumns;
        return;
    }
    float* const scratch = reinterpret_cast<float*>(shared_memory());
    auto* const known = reinterpret_cast<unsigned*>(scratch + kScratchFloats);  // a bit a column
    const auto logits = logits_row<T>(args, row);
    for (int i = threadIdx.x; i * 4 < logits.packs(); i += blockDim.x) known[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < args.known; i += blockDim.x) {
        const int column = known_column(args, row, i);
        if (column >= 0) atomicOr(known + column / 32, 1u << column % 32);
    }
    __syncthreads();

    const float scale = kLog2E / args.temperature;
    float m = kNoColumns, off = 0.f, on = 0.f, unit = 0.f;
    for_each_piece<false>(logits, -INFINITY, [&](int index, const Pack<T>& piece) {
        float x[kWidth], largest = m;
        unpack(piece, x);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) largest = fmaxf(largest, x[i]);
        const float shift = m - largest, weight = kl_exp2(shift * scale);
        off *= weight;
        on *= weight;
        unit *= kl_exp2(shift * kLog2E);
        m = largest;
        const unsigned bits = known[index / 4] >> index % 4 * kWidth;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            const float e = kl_exp2((x[i] - m) * scale);
            if (bits >> i & 1) {
                on += e;
            } else {
                off += e;
            }
            if (args.labels) unit += kl_exp2((x[i] - m) * kLog2E);
        }
    });
    float reference[1] = {m};
    reduce_block(reference, scratch, [](float x, float y) { return fmaxf(x, y); });
    const float shift = m - reference[0], weight = kl_weight(shift / args.temperature);
    m = reference[0];
    float sums[kSums] = {off * weight, on * weight, 0.f, 0.f, unit * kl_weight(shift)};
    for (int i = threadIdx.x; i < args.known; i += blockDim.x) {
        const int column = known_column(args, row, i);
        if (column < 0) continue;
        const float w = args.weights[row * args.known + i];
        if (w > 0.f) {
            sums[2] += w * (logf(w) - (widen(logits.data[column]) - m) / args.temperature);
        }
        sums[3] += w;
    }
    sum_over_block(sums, scratch);
    if (threadIdx.x > 0) return;
    const int label = label_column(args.labels, row, args.label_offset, args.columns);
    out[0] = m;
    for (int i = 0; i < kSums; ++i) out[1 + i] = sums[i];
    out[6] = label >= 0 ? widen(logits.data[label]) : 0.f;
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads, 2)
    gradient_kernel(const __grid_constant__ SparseKLArguments args,
                    const __grid_constant__ LogitKLGradient out, const SparseKLMerged* merged,
                    float* scratch) {
    const int64_t row = blockIdx.x;
    T* const to = gradient_row<T>(out, row);
    const int columns = static_cast<int>(args.columns), padding = static_cast<int>(args.padding);
    if (args.mask && !args.mask[row]) {
        zero(to, 0, columns + padding);
        return;
    }
    const auto logits = logits_row<T>(args, row);
    float* const known = scratch + row * args.known;  // logits, before they go
    for (int i = threadIdx.x; i < args.known; i += blockDim.x) {
        const int column = known_column(args, row, i);
        if (column >= 0) known[i] = widen(logits.data[column]);
    }
    __syncthreads();

    const SparseKLMerged r = merged[row];
    const float scale = kLog2E / args.temperature, weight = out.weights[row] / args.temperature;
    const float share = r.mass / r.total, tail = r.off > 0.f ? r.rest / r.off : 0.f;
    const int label = label_column(args.labels, row, args.label_offset, args.columns);
    const float lambda = args.labels ? out.weights[out.tokens + row] : 0.f;
    const float gamma = args.labels ? lambda / r.unit : 0.f;
    const auto slope_of = [&](float student, float of_exponential, float constant) {
        const float x = student - r.m;
        float slope = weight * fmaf(of_exponential, kl_exp2(x * scale), constant);
        if (args.labels) slope = fmaf(gamma, kl_exp2(x * kLog2E), slope);
        return slope;
    };
    const RowWriter<T> writer(to, columns);
    for_each_piece<true>(logits, -INFINITY, [&](int index, const Pack<T>& piece) {
        float x[kWidth];
        unpack(piece, x);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) x[i] = slope_of(x[i], share - tail, 0.f);
        subtract_at_label(x, index, label, lambda);
        writer.store(index, x);
    });
    __syncthreads();
    for (int i = threadIdx.x; i < args.known; i += blockDim.x) {
        const int column = known_column(args, row, i);
        if (column < 0) continue;
        const float w = args.weights[row * args.known + i];
        narrow(slope_of(known[i], share, -w) - (column == label ? lambda : 0.f), to[column]);
    }
    zero(to, columns, columns + padding);
}

}  // namespace

const char* sparse_kl_statistics(const SparseKLArguments& args, float* statistics, void* stream) {
    const int64_t words = (args.columns + 31) / 32;
    const Grid grid = {args.tokens, threads_for(args.columns),
                       kScratchFloats * sizeof(float) + words * sizeof(unsigned)};
    return message(args.student.dtype == Dtype::kFloat32
                       ? launch(statistics_kernel<float>, grid, stream, args, statistics)
                       : launch(statistics_kernel<BFloat16>, grid, stream, args, statistics));
}

const char* sparse_kl_gradient(const SparseKLArguments& args, const LogitKLGradient& gradient,
                               const float* merged, float* scratch, void* stream) {
    const Grid grid = {args.tokens, threads_for(args.columns)};
    const auto* const from = reinterpret_cast<const SparseKLMerged*>(merged);
    return message(
        args.student.dtype == Dtype::kFloat32
            ? launch(gradient_kernel<float>, grid, stream, args, gradient, from, scratch)
            : launch(gradient_kernel<BFloat16>, grid, stream, args, gradient, from, scratch));
}

}  // namespace minitron::cuda
