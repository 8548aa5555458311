// The cosine between two rows, in one read of both: a row to a block.

#include "common.cuh"
#include "kernels.h"

namespace minitron::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kMaxThreads, 2)
    cosine_kernel(const __grid_constant__ Activations before, const void* after, float* out) {
    const int64_t row = blockIdx.x, start = row * before.columns;
    const int columns = static_cast<int>(before.columns);
    const RowReader<T> x(static_cast<const T*>(before.data) + start, columns);
    const RowReader<T> y(static_cast<const T*>(after) + start, columns);
    float sums[3] = {};  // x·y, x·x, y·y
    for_each_pair<true>(x, y, 0, x.packs(), 0.f,
                        [&](int, const Pack<T>& first, const Pack<T>& second) {
                            float u[kWidth], v[kWidth];
                            unpack(first, u);
                            unpack(second, v);
#pragma unroll
                            for (int i = 0; i < kWidth; ++i) {
                                sums[0] = fmaf(u[i], v[i], sums[0]);
                                sums[1] = fmaf(u[i], u[i], sums[1]);
                                sums[2] = fmaf(v[i], v[i], sums[2]);
                            }
                        });
    sum_over_block(sums, reinterpret_cast<float*>(shared_memory()));
    if (threadIdx.x > 0) return;
    out[row] =
        sums[0] / (fmaxf(sqrtf(sums[1]), kSmallestNorm) * fmaxf(sqrtf(sums[2]), kSmallestNorm));
}

}  // namespace

const char* block_cosine(const Activations& before, const void* after, float* out, void* stream) {
    const int threads = threads_for(before.columns);
    const Grid grid = {before.rows, threads, threads / kWarp * 3 * sizeof(float)};
    return message(before.bfloat16
                       ? launch(cosine_kernel<BFloat16>, grid, stream, before, after, out)
                       : launch(cosine_kernel<float>, grid, stream, before, after, out));
}

}  // namespace minitron::cuda
