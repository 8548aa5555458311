// The sweeps over logits of csrc/include/kl_row.h, for GPUs: a row of logits to a block.
//
// The fused kernel gives a row to a cluster of blocks (from compute capability 9.0 on). Each keeps
// a part of the row in its shared memory, they exchange statistics, and each writes the gradient of
// its part: logits are read from memory once. Rows too long for that, and older GPUs, are read
// twice, which is what statistics and gradient cost one after the other.

#include <cooperative_groups.h>

#include <type_traits>

#include "common.cuh"
#include "kernels.h"
#include "kl_row.h"
#include "logit_rows.cuh"

namespace minitron::cuda {
namespace {

constexpr int kScratchFloats = kMaxThreads / kWarp * 5;
constexpr int kBlockBytes = (kScratchFloats * sizeof(float) + sizeof(KLStatistics) + 15) / 16 * 16;

// This thread's part of the statistics of the pieces [begin, end); keep(index, student, teacher)
// sees each.
template <bool kAll, bool kLast, typename S, typename T, typename Keep>
__device__ KLStatistics sweep(const LogitReader<S, T>& logits, int begin, int end,
                              float temperature, const Keep& keep) {
    const float scale = kLog2E / temperature;
    KLStatistics r = kl_neutral();
    for_each_pair<kLast>(logits.student, logits.teacher, begin, end, -INFINITY,
                         [&](int index, const Pack<S>& student, const Pack<T>& teacher) {
                             keep(index, student, teacher);
                             float x[kWidth], y[kWidth];
                             unpack(student, x);
                             unpack(teacher, y);
                             kl_add<kAll>(r, x, y, scale);
                         });
    return kl_finish<kAll>(r, temperature);
}

// All threads' statistics, merged for each of them.
__device__ KLStatistics merge_over_block(const KLStatistics& own, float temperature,
                                         float* scratch) {
    float references[2] = {own.m, own.n};
    reduce_block(references, scratch, [](float x, float y) { return fmaxf(x, y); });
    const auto r = kl_with_references(own, references[0], references[1], temperature);
    float sums[5] = {r.a, r.b, r.c, r.d, r.e};
    sum_over_block(sums, scratch);
    return {r.m, r.n, sums[0], sums[1], sums[2], sums[3], sums[4], 0.f};
}

__device__ KLGradient row_gradient(const KLStatistics& r, const LogitKLArguments& args,
                                   const LogitKLGradient& out, int64_t row) {
    float weights[kNumLosses];
#pragma unroll
    for (int i = 0; i < kNumLosses; ++i) weights[i] = out.weights[i * out.tokens + row];
    return kl_gradient(r, weights, args.temperature);
}

// The gradient of one piece.
template <bool kAll, typename S, typename T>
__device__ void write_gradient(const RowWriter<S>& to, int index, const Pack<S>& student,
                               const Pack<T>& teacher, const KLGradient& g, int label) {
    float x[kWidth], y[kWidth], slope[kWidth];
    unpack(student, x);
    unpack(teacher, y);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) slope[i] = kl_slope<kAll>(g, x[i], y[i]);
    subtract_at_label(slope, index, label, g.lambda);
    to.store(index, slope);
}

template <bool kAll, typename S, typename T>
__global__ void __launch_bounds__(kMaxThreads, 2)
    statistics_kernel(const __grid_constant__ LogitKLArguments args, KLStatistics* out) {
    const int64_t row = blockIdx.x;
    if (is_masked(args, row)) {
        if (threadIdx.x == 0) out[row] = kl_neutral();
        return;
    }
    const LogitReader<S, T> logits(args, row);
    const auto own = sweep<kAll, false>(logits, 0, logits.student.packs(), args.temperature,
                                        [](int, const Pack<S>&, const Pack<T>&) {});
    KLStatistics r =
        merge_over_block(own, args.temperature, reinterpret_cast<float*>(shared_memory()));
    if (threadIdx.x == 0) {
        const int label = label_column(args.labels, row, args.label_offset, args.columns);
        if (label >= 0) r.l = widen(logits.student.data[label]);
        out[row] = r;
    }
}

__global__ void __launch_bounds__(kMaxThreads)
    merge_kernel(const KLStatistics* gathered, int64_t ranks, int64_t tokens, const bool* mask,
                 float temperature, float* losses, KLStatistics* merged) {
    const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (token >= tokens) return;
    KLStatistics r = gathered[token];
    for (int64_t rank = 1; rank < ranks; ++rank) {
        r = kl_merge(r, gathered[rank * tokens + token], temperature);
    }
    merged[token] = r;
    const KLLosses l = mask && !mask[token] ? KLLosses{0.f, 0.f, 0.f, 0.f} : kl_losses(r);
    losses[token] = l.forward_kl;
    losses[tokens + token] = l.reverse_kl;
    losses[2 * tokens + token] = l.cross_entropy;
    losses[3 * tokens + token] = l.z_loss;
}

template <bool kAll, typename S, typename T>
__global__ void __launch_bounds__(kMaxThreads, 2)
    gradient_kernel(const __grid_constant__ LogitKLArguments args,
                    const __grid_constant__ LogitKLGradient out, const KLStatistics* merged) {
    const int64_t row = blockIdx.x;
    S* const to = gradient_row<S>(out, row);
    const int columns = static_cast<int>(args.columns), padding = static_cast<int>(args.padding);
    if (is_masked(args, row)) {
        zero(to, 0, columns + padding);
        return;
    }
    const LogitReader<S, T> logits(args, row);
    const RowWriter<S> writer(to, columns);
    const auto g = row_gradient(merged[row], args, out, row);
    const int label = label_column(args.labels, row, args.label_offset, args.columns);
    for_each_pair<true>(logits.student, logits.teacher, 0, logits.student.packs(), -INFINITY,
                        [&](int index, const Pack<S>& student, const Pack<T>& teacher) {
                            write_gradient<kAll>(writer, index, student, teacher, g, label);
                        });
    zero(to, columns, columns + padding);
}

template <bool kAll, typename S, typename T>
__global__ void __launch_bounds__(kMaxThreads, 2)
    fused_kernel(const __grid_constant__ LogitKLArguments args,
                 const __grid_constant__ LogitKLGradient out, KLStatistics* statistics) {
    const int64_t row = blockIdx.x;
    S* const to = gradient_row<S>(out, row);
    const int columns = static_cast<int>(args.columns), padding = static_cast<int>(args.padding);
    if (is_masked(args, row)) {
        if (threadIdx.x == 0) statistics[row] = kl_neutral();
        zero(to, 0, columns + padding);
        return;
    }
    const LogitReader<S, T> logits(args, row);
    const int packs = logits.student.packs();
    const auto own = sweep<kAll, false>(logits, 0, packs, args.temperature,
                                        [](int, const Pack<S>&, const Pack<T>&) {});
    // Read before the thread that has it may write over it.
    const int label = label_column(args.labels, row, args.label_offset, args.columns);
    const float label_logit = label >= 0 ? widen(logits.student.data[label]) : 0.f;
    KLStatistics r =
        merge_over_block(own, args.temperature, reinterpret_cast<float*>(shared_memory()));
    r.l = label_logit;
    if (threadIdx.x == 0) statistics[row] = r;
    const auto g = row_gradient(r, args, out, row);
    const RowWriter<S> writer(to, columns);
    for_each_pair<true>(logits.student, logits.teacher, 0, packs, -INFINITY,
                        [&](int index, const Pack<S>& student, const Pack<T>& teacher) {
                            write_gradient<kAll>(writer, index, student, teacher, g, label);
                        });
    zero(to, columns, columns + padding);
}

// A row to a cluster of blocks, of which each keeps its part in shared memory.
template <bool kAll, typename S, typename T>
__global__ void __launch_bounds__(kMaxThreads, 2)
    resident_kernel(const __grid_constant__ LogitKLArguments args,
                    const __grid_constant__ LogitKLGradient out, KLStatistics* statistics) {
#if __CUDA_ARCH__ >= 900
    const auto cluster = cooperative_groups::this_cluster();
    const int part = static_cast<int>(cluster.block_rank());
    const int parts = static_cast<int>(cluster.num_blocks());
    const int64_t row = blockIdx.x / parts;
    S* const to = gradient_row<S>(out, row);
    const int columns = static_cast<int>(args.columns), padding = static_cast<int>(args.padding);
    const bool last = part == parts - 1;

    const LogitReader<S, T> logits(args, row);
    const int packs = logits.student.packs(), share = (packs + parts - 1) / parts;
    const int begin = min(part * share, packs), end = min(begin + share, packs);
    if (is_masked(args, row)) {
        if (last && threadIdx.x == 0) statistics[row] = kl_neutral();
        zero(to, min(begin * kWidth, columns),
             last ? columns + padding : min(end * kWidth, columns));
        return;
    }
    float* const scratch = reinterpret_cast<float*>(shared_memory());
    auto* const exchanged = reinterpret_cast<KLStatistics*>(scratch + kScratchFloats);
    auto* const students = reinterpret_cast<Pack<S>*>(shared_memory() + kBlockBytes);
    auto* const teachers = reinterpret_cast<Pack<T>*>(students + share);

    const auto own =
        sweep<kAll, true>(logits, begin, end, args.temperature,
                          [&](int index, const Pack<S>& student, const Pack<T>& teacher) {
                              students[index - begin] = student;
                              teachers[index - begin] = teacher;
                          });
    const int label = label_column(args.labels, row, args.label_offset, args.columns);
    const float label_logit = label >= 0 ? widen(logits.student.data[label]) : 0.f;
    const KLStatistics of_part = merge_over_block(own, args.temperature, scratch);
    if (threadIdx.x == 0) *exchanged = of_part;
    cluster.sync();
    KLStatistics r = *cluster.map_shared_rank(exchanged, 0);
    for (int other = 1; other < parts; ++other) {
        r = kl_merge(r, *cluster.map_shared_rank(exchanged, other), args.temperature);
    }
    cluster.sync();  // nobody leaves while others read what it has
    r.l = label_logit;
    if (last && threadIdx.x == 0) statistics[row] = r;

    const auto g = row_gradient(r, args, out, row);
    const RowWriter<S> writer(to, columns);
    for (int index = begin + threadIdx.x; index < end; index += blockDim.x) {
        write_gradient<kAll>(writer, index, students[index - begin], teachers[index - begin], g,
                             label);
    }
    if (last) zero(to, columns, columns + padding);
#endif
}

// Calls f(kAll, S, T) for what the arguments ask.
template <typename F>
cudaError_t specialise(const LogitKLArguments& args, const F& f) {
    const auto with = [&](auto all) {
        return by_dtype(args, [&](auto student, auto teacher) { return f(all, student, teacher); });
    };
    return args.reverse || args.unit_sum ? with(std::true_type()) : with(std::false_type());
}

int64_t element_bytes(const LogitRows& rows) { return rows.dtype == Dtype::kFloat32 ? 4 : 2; }

// How the row-resident kernel would run: without blocks where it cannot, for whatever reason, since
// the fused kernel needs none of what it asks for.
template <typename Kernel>
Grid resident_grid(Kernel* kernel, const LogitKLArguments& args, int64_t tokens, void* stream) {
    const auto possible = [](cudaError_t error) {
        if (error != cudaSuccess) cudaGetLastError();  // or the next launch would be blamed for it
        return error == cudaSuccess;
    };
    cudaFuncAttributes attributes;
    int limit;
    if (tokens == 0 || !possible(cudaFuncGetAttributes(&attributes, kernel)) ||
        attributes.ptxVersion < 90 || !possible(allow_shared_memory(kernel, limit))) {
        return {};
    }
    constexpr int kMostBlocks = 8;  // that every GPU with clusters offers
    const int64_t packs = (args.columns + kWidth - 1) / kWidth;
    const auto bytes = [&](int64_t cluster) {
        return kBlockBytes + (packs + cluster - 1) / cluster * kWidth *
                                 (element_bytes(args.student) + element_bytes(args.teacher));
    };
    int cluster = 1;  // two blocks to a multiprocessor, so that one loads while the other stores
    while (cluster < kMostBlocks && bytes(cluster) > limit / 2 - 1024) cluster *= 2;
    if (bytes(cluster) > limit) return {};

    const Grid wanted = {tokens * cluster, threads_for(args.columns / cluster),
                         static_cast<size_t>(bytes(cluster)), cluster};
    const Launch attempt(wanted, stream);
    int fit = 0;
    if (!possible(cudaOccupancyMaxActiveClusters(&fit, kernel, &attempt.config)) || fit == 0) {
        return {};
    }
    return wanted;
}

Grid row_grid(const LogitKLArguments& args, int64_t tokens) {
    return {tokens, threads_for(args.columns), kScratchFloats * sizeof(float)};
}

}  // namespace

const char* logit_kl_statistics(const LogitKLArguments& args, int64_t tokens, float* statistics,
                                void* stream) {
    return message(specialise(args, [&](auto all, auto student, auto teacher) {
        return launch(statistics_kernel<all, decltype(student), decltype(teacher)>,
                      row_grid(args, tokens), stream, args,
                      reinterpret_cast<KLStatistics*>(statistics));
    }));
}

const char* logit_kl_merge(const float* gathered, int64_t ranks, int64_t tokens, const bool* mask,
                           float temperature, float* losses, float* merged, void* stream) {
    constexpr int kThreads = 128;
    return message(launch(merge_kernel, {(tokens + kThreads - 1) / kThreads, kThreads}, stream,
                          reinterpret_cast<const KLStatistics*>(gathered), ranks, tokens, mask,
                          temperature, losses, reinterpret_cast<KLStatistics*>(merged)));
}

const char* logit_kl_gradient(const LogitKLArguments& args, const LogitKLGradient& gradient,
                              const float* merged, void* stream) {
    return message(specialise(args, [&](auto all, auto student, auto teacher) {
        return launch(gradient_kernel<all, decltype(student), decltype(teacher)>,
                      row_grid(args, gradient.tokens), stream, args, gradient,
                      reinterpret_cast<const KLStatistics*>(merged));
    }));
}

const char* logit_kl_fused(const LogitKLArguments& args, const LogitKLGradient& gradient,
                           float* statistics, void* stream) {
    return message(specialise(args, [&](auto all, auto student, auto teacher) {
        auto* const out = reinterpret_cast<KLStatistics*>(statistics);
        const auto resident = resident_kernel<all, decltype(student), decltype(teacher)>;
        const Grid grid = resident_grid(resident, args, gradient.tokens, stream);
        if (grid.blocks > 0) return launch(resident, grid, stream, args, gradient, out);
        return launch(fused_kernel<all, decltype(student), decltype(teacher)>,
                      row_grid(args, gradient.tokens), stream, args, gradient, out);
    }));
}

}  // namespace minitron::cuda
