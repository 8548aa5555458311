// What the CUDA kernels share: rows in 16-byte pieces, reductions over a block, launches.
//
// A thread takes kWidth elements at a time, always the same ones: where a row is not aligned to 16
// bytes they are read one by one, so that alignment costs time but changes no digit. Results never
// depend on the order in which blocks or threads run.

#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace minitron::cuda {

constexpr int kWarp = 32;
constexpr int kWidth = 8;
constexpr int kMaxThreads = 512;

using BFloat16 = __nv_bfloat16;

// The block's shared memory, as much as the launch asked for.
__device__ inline char* shared_memory() {
    extern __shared__ __align__(16) char minitron_shared_memory[];
    return minitron_shared_memory;
}

// kWidth elements as they lie in memory.
template <typename T>
struct Pack {
    uint4 quads[kWidth * sizeof(T) / sizeof(uint4)];
};

__device__ inline void unpack(const Pack<float>& from, float (&to)[kWidth]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint4 quad = from.quads[i];
        to[4 * i] = __uint_as_float(quad.x);
        to[4 * i + 1] = __uint_as_float(quad.y);
        to[4 * i + 2] = __uint_as_float(quad.z);
        to[4 * i + 3] = __uint_as_float(quad.w);
    }
}

__device__ inline void unpack(const Pack<BFloat16>& from, float (&to)[kWidth]) {
    const uint4 quad = from.quads[0];
    const unsigned pairs[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        to[2 * i] = __uint_as_float(pairs[i] << 16);
        to[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
}

__device__ inline void pack(const float (&from)[kWidth], Pack<float>& to) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        to.quads[i] =
            make_uint4(__float_as_uint(from[4 * i]), __float_as_uint(from[4 * i + 1]),
                       __float_as_uint(from[4 * i + 2]), __float_as_uint(from[4 * i + 3]));
    }
}

__device__ inline unsigned round_pair(float low, float high) {
    const unsigned short l = __bfloat16_as_ushort(__float2bfloat16_rn(low));
    const unsigned short h = __bfloat16_as_ushort(__float2bfloat16_rn(high));
    return static_cast<unsigned>(h) << 16 | l;
}

__device__ inline void pack(const float (&from)[kWidth], Pack<BFloat16>& to) {
    to.quads[0] = make_uint4(round_pair(from[0], from[1]), round_pair(from[2], from[3]),
                             round_pair(from[4], from[5]), round_pair(from[6], from[7]));
}

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(BFloat16 x) { return __bfloat162float(x); }
__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(float x, BFloat16& to) { to = __float2bfloat16_rn(x); }

__device__ inline bool is_aligned(const void* address) {
    return reinterpret_cast<uintptr_t>(address) % sizeof(uint4) == 0;
}

// A row of which pieces are read. kLast reads are the last that anybody does: they leave the caches
// to others.
template <typename T>
struct RowReader {
    const T* data;
    int columns;
    bool aligned;

    __device__ RowReader(const T* data, int columns)
        : data(data), columns(columns), aligned(is_aligned(data)) {}

    __device__ int packs() const { return (columns + kWidth - 1) / kWidth; }

    __device__ bool is_whole(int index) const {
        return aligned && columns - index * kWidth >= kWidth;
    }

    // A piece for which is_whole().
    template <bool kLast>
    __device__ Pack<T> load_whole(int index) const {
        Pack<T> result;
        constexpr int kQuads = sizeof(result.quads) / sizeof(uint4);
        const uint4* const from =
            reinterpret_cast<const uint4*>(data + static_cast<int64_t>(index) * kWidth);
#pragma unroll
        for (int i = 0; i < kQuads; ++i) result.quads[i] = kLast ? __ldcs(from + i) : from[i];
        return result;
    }

    // Any piece; columns past the end are `fill`.
    template <bool kLast>
    __device__ Pack<T> load(int index, float fill) const {
        if (is_whole(index)) return load_whole<kLast>(index);
        const T* const from = data + static_cast<int64_t>(index) * kWidth;
        float values[kWidth];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            values[i] = index * kWidth + i < columns ? widen(from[i]) : fill;
        }
        Pack<T> result;
        pack(values, result);
        return result;
    }
};

// Calls f(index, piece) for this thread's pieces of a row. The next piece is on its way while one
// is worked on.
template <bool kLast, typename T, typename F>
__device__ void for_each_piece(const RowReader<T>& row, float fill, const F& f) {
    Pack<T> next = {};
    const auto fetch = [&](int index) {
        if (index < row.packs()) next = row.template load<kLast>(index, fill);
    };
    fetch(threadIdx.x);
    for (int index = threadIdx.x; index < row.packs(); index += blockDim.x) {
        const Pack<T> piece = next;
        fetch(index + blockDim.x);
        f(index, piece);
    }
}

// The same for two rows and the pieces [begin, end): f(index, a, b). Two rows of fp32 fill the
// registers, and the memory's pipeline, without looking ahead, and so does long arithmetic.
template <bool kLast, bool kAllowAhead = true, typename A, typename B, typename F>
__device__ void for_each_pair(const RowReader<A>& first, const RowReader<B>& second, int begin,
                              int end, float fill, const F& f) {
    constexpr bool kAhead = kAllowAhead && sizeof(A) + sizeof(B) < 2 * sizeof(float);
    Pack<A> a = {};
    Pack<B> b = {};
    const auto fetch = [&](int index) {
        if (index >= end) return;
        a = first.template load<kLast>(index, fill);
        b = second.template load<kLast>(index, fill);
    };
    if constexpr (kAhead) fetch(begin + threadIdx.x);
    for (int index = begin + threadIdx.x; index < end; index += blockDim.x) {
        if constexpr (!kAhead) fetch(index);
        const Pack<A> x = a;
        const Pack<B> y = b;
        if constexpr (kAhead) fetch(index + blockDim.x);
        f(index, x, y);
    }
}

// A row of which pieces are written, past the caches where it is aligned.
template <typename T>
struct RowWriter {
    T* data;
    int columns;
    bool aligned;

    __device__ RowWriter(T* data, int columns)
        : data(data), columns(columns), aligned(is_aligned(data)) {}

    __device__ void store(int index, const float (&values)[kWidth]) const {
        T* const to = data + static_cast<int64_t>(index) * kWidth;
        const int count = columns - index * kWidth;
        if (aligned && count >= kWidth) {
            Pack<T> packed;
            pack(values, packed);
            constexpr int kQuads = sizeof(packed.quads) / sizeof(uint4);
#pragma unroll
            for (int i = 0; i < kQuads; ++i) {
                __stcs(reinterpret_cast<uint4*>(to) + i, packed.quads[i]);
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            if (i < count) narrow(values[i], to[i]);
        }
    }
};

// Zeroes the columns [begin, end).
template <typename T>
__device__ void zero(T* row, int begin, int end) {
    int first = begin;  // that is aligned
    while (first < end && !is_aligned(row + first)) ++first;
    const RowWriter<T> rest(row + first, end - first);
    const float zeros[kWidth] = {};
    for (int i = begin + threadIdx.x; i < first; i += blockDim.x) narrow(0.f, row[i]);
    for (int i = threadIdx.x; i * kWidth < rest.columns; i += blockDim.x) rest.store(i, zeros);
}

// Combines the values of all threads of the block, of which each gets the results. The scratch
// memory holds kCount floats a warp.
template <int kCount, typename Combine>
__device__ void reduce_block(float (&values)[kCount], float* scratch, const Combine& combine) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
        for (int offset = kWarp / 2; offset > 0; offset /= 2) {
            values[i] = combine(values[i], __shfl_xor_sync(0xffffffffu, values[i], offset));
        }
    }
    __syncthreads();  // an earlier reduction may still be read
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) scratch[threadIdx.x / kWarp * kCount + i] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = scratch[i];
    for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            values[i] = combine(values[i], scratch[warp * kCount + i]);
        }
    }
}

template <int kCount>
__device__ void sum_over_block(float (&values)[kCount], float* scratch) {
    reduce_block(values, scratch, [](float x, float y) { return x + y; });
}

// Threads for a row of this many columns: a few pieces each.
inline int threads_for(int64_t columns) {
    int threads = kWarp;
    while (threads < kMaxThreads && threads * 4 * kWidth < columns) threads *= 2;
    return threads;
}

struct Grid {
    int64_t blocks;
    int threads;
    size_t shared_bytes = 0;
    int cluster = 1;  // blocks that can read each other's shared memory
};

// A launch's configuration, which refers to itself.
struct Launch {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute cluster = {};

    Launch(const Grid& grid, void* stream) {
        config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
        config.blockDim = dim3(static_cast<unsigned>(grid.threads));
        config.dynamicSmemBytes = grid.shared_bytes;
        config.stream = static_cast<cudaStream_t>(stream);
        if (grid.cluster > 1) {
            cluster.id = cudaLaunchAttributeClusterDimension;
            cluster.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
            cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
            config.attrs = &cluster;
            config.numAttrs = 1;
        }
    }
    Launch(const Launch&) = delete;
};

// Shared memory of which a kernel need not say beforehand that it wants it.
constexpr size_t kUnaskedBytes = 48 << 10;

// Lets blocks of the kernel have as much shared memory as the device offers, and says how much that
// is. Never less: another thread of the host may be about to launch the same kernel.
template <typename Kernel>
cudaError_t allow_shared_memory(Kernel* kernel, int& most) {
    int device;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& grid, void* stream,
                   const Arguments&... arguments) {
    if (grid.blocks == 0) return cudaSuccess;
    if (grid.shared_bytes > kUnaskedBytes) {
        int most;
        const cudaError_t error = allow_shared_memory(kernel, most);
        if (error != cudaSuccess) return error;
    }
    const Launch launch(grid, stream);
    return cudaLaunchKernelEx(&launch.config, kernel, Parameters(arguments)...);
}

inline const char* message(cudaError_t error) {
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace minitron::cuda
