// Sums over the rows of an activation, for every column, in one read.
//
// A block takes kRowsPerBlock rows of kWarp · kWidth columns, a warp every kWarps-th of them, and
// writes the block's sums in fp32; a second kernel adds up blocks in fp64, in order. With groups, a
// few neighbouring threads share a group and take its norm first; the rest is the same.

#include "common.cuh"
#include "kernels.h"

namespace minitron::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kRowsPerBlock = 128;
constexpr int kColumnsPerBlock = kWarp * kWidth;

// What a thread knows of one column, or group.
struct Sums {
    float values[kNumActivationStats] = {};

    __device__ void add(float x) {
        values[0] += fabsf(x);
        values[1] = fmaf(x, x, values[1]);
        values[2] += x;
        values[3] = fmaxf(values[3], fabsf(x));
    }

    __device__ void add(const Sums& other) {
#pragma unroll
        for (int i = 0; i < 3; ++i) values[i] += other.values[i];
        values[3] = fmaxf(values[3], other.values[3]);
    }
};

int64_t row_blocks(const Activations& x) {
    return x.rows == 0 ? 1 : (x.rows + kRowsPerBlock - 1) / kRowsPerBlock;
}

// Sums of one row block for the columns of one block: `partial` [row blocks, 4, columns].
template <typename T>
__global__ void __launch_bounds__(kWarp* kWarps, 3)
    column_kernel(const __grid_constant__ Activations x, int64_t column_blocks, float* partial) {
    const int64_t row_block = blockIdx.x / column_blocks;
    const int64_t first = blockIdx.x % column_blocks * kColumnsPerBlock;
    const int64_t end = min((row_block + 1) * kRowsPerBlock, x.rows);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int columns = static_cast<int>(min(x.columns - first, int64_t{kColumnsPerBlock}));

    Sums sums[kWidth];
    const auto reader = [&](int64_t row) {
        return RowReader<T>(static_cast<const T*>(x.data) + row * x.columns + first, columns);
    };
    const auto add_rows = [&](const auto& load) {
#pragma unroll 4
        for (int64_t row = row_block * kRowsPerBlock + warp; row < end; row += kWarps) {
            float values[kWidth];
            unpack(load(row), values);
#pragma unroll
            for (int i = 0; i < kWidth; ++i) sums[i].add(values[i]);
        }
    };
    // Rows that are all aligned are loaded without asking, so that four loads are under way.
    if (reader(0).is_whole(lane) && is_aligned(static_cast<const T*>(x.data) + x.columns + first)) {
        add_rows([&](int64_t row) { return reader(row).template load_whole<true>(lane); });
    } else {
        add_rows([&](int64_t row) { return reader(row).template load<true>(lane, 0.f); });
    }

    auto* const shared = reinterpret_cast<Sums*>(shared_memory());  // [kWarps, kColumnsPerBlock]
#pragma unroll
    for (int i = 0; i < kWidth; ++i) shared[warp * kColumnsPerBlock + lane * kWidth + i] = sums[i];
    __syncthreads();
    if (static_cast<int>(threadIdx.x) >= columns) return;
    Sums total = shared[threadIdx.x];
    for (int other = 1; other < kWarps; ++other) {
        total.add(shared[other * kColumnsPerBlock + threadIdx.x]);
    }
#pragma unroll
    for (int k = 0; k < kNumActivationStats; ++k) {
        partial[(row_block * kNumActivationStats + k) * x.columns + first + threadIdx.x] =
            total.values[k];
    }
}

// Sums of one row block for one group: `partial` [row blocks, 4, groups]. `sharers` threads, a
// power of two, share a group, so that a warp takes several rows at a time.
template <typename T>
__global__ void __launch_bounds__(kWarp* kWarps, 3)
    group_kernel(const __grid_constant__ Activations x, int64_t groups, int sharers,
                 float* partial) {
    const int64_t row_block = blockIdx.x / groups, group = blockIdx.x % groups;
    const int64_t begin = row_block * kRowsPerBlock;
    const int rows = static_cast<int>(min(x.rows - begin, int64_t{kRowsPerBlock}));
    const int at_once = kWarp * kWarps / sharers, lane = threadIdx.x % sharers;

    Sums sums;
    for (int start = 0; start < rows; start += at_once) {  // no thread leaves before the others
        const int row = start + threadIdx.x / sharers;
        float square = 0.f;
        if (row < rows) {
            const int64_t offset = (begin + row) * x.columns + group * x.group;
            const RowReader<T> reader(static_cast<const T*>(x.data) + offset,
                                      static_cast<int>(x.group));
            for (int index = lane; index < reader.packs(); index += sharers) {
                float values[kWidth];
                unpack(reader.template load<true>(index, 0.f), values);
#pragma unroll
                for (int i = 0; i < kWidth; ++i) square = fmaf(values[i], values[i], square);
            }
        }
        for (int offset = sharers / 2; offset > 0; offset /= 2) {
            square += __shfl_xor_sync(0xffffffffu, square, offset);
        }
        if (lane == 0) {  // the norm of a row that is not there is 0, which changes nothing
            const float norm = sqrtf(square);
            sums.values[0] += norm;
            sums.values[1] += square;
            sums.values[2] += norm;
            sums.values[3] = fmaxf(sums.values[3], norm);
        }
    }

    float* const scratch = reinterpret_cast<float*>(shared_memory());
    float added[3] = {sums.values[0], sums.values[1], sums.values[2]};
    float largest[1] = {sums.values[3]};
    sum_over_block(added, scratch);
    reduce_block(largest, scratch, [](float x, float y) { return fmaxf(x, y); });
    if (threadIdx.x > 0) return;
    float* const out = partial + row_block * kNumActivationStats * groups + group;
    for (int k = 0; k < 3; ++k) out[k * groups] = added[k];
    out[3 * groups] = largest[0];
}

// Row blocks' sums added up: `out` [4, columns].
__global__ void __launch_bounds__(kWarp* kWarps)
    combine_kernel(const float* partial, int64_t row_blocks, int64_t columns, double* out) {
    const int64_t values = kNumActivationStats * columns;
    const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= values) return;
    const bool maximum = at >= 3 * columns;
    double total = 0;
    for (int64_t block = 0; block < row_blocks; ++block) {
        const double value = partial[block * values + at];
        total = maximum ? fmax(total, value) : total + value;
    }
    out[at] = total;
}

template <typename T>
cudaError_t partial_sums(const Activations& x, float* partial, void* stream) {
    if (x.group == 1) {
        const int64_t column_blocks = (x.columns + kColumnsPerBlock - 1) / kColumnsPerBlock;
        const Grid grid = {row_blocks(x) * column_blocks, kWarp * kWarps,
                           kWarps * kColumnsPerBlock * sizeof(Sums)};
        return launch(column_kernel<T>, grid, stream, x, column_blocks, partial);
    }
    const int64_t groups = x.columns / x.group;
    int sharers = 1;
    while (sharers < kWarp && sharers * kWidth < x.group) sharers *= 2;
    const Grid grid = {row_blocks(x) * groups, kWarp * kWarps, kWarps * 3 * sizeof(float)};
    return launch(group_kernel<T>, grid, stream, x, groups, sharers, partial);
}

}  // namespace

int64_t activation_stats_scratch(const Activations& x) {
    return row_blocks(x) * kNumActivationStats * (x.columns / x.group);
}

const char* activation_stats(const Activations& x, float* scratch, double* out, void* stream) {
    const cudaError_t error = x.bfloat16 ? partial_sums<BFloat16>(x, scratch, stream)
                                         : partial_sums<float>(x, scratch, stream);
    if (error != cudaSuccess) return message(error);
    const int64_t columns = x.columns / x.group;
    constexpr int kThreads = kWarp * kWarps;
    const Grid grid = {(kNumActivationStats * columns + kThreads - 1) / kThreads, kThreads};
    return message(launch(combine_kernel, grid, stream, scratch, row_blocks(x), columns, out));
}

}  // namespace minitron::cuda
