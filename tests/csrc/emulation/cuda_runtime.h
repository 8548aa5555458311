// As much of CUDA as the kernels of csrc/cuda use, on a CPU: g++ compiles them against this header,
// and they run as they are, indexing, barriers, shuffles, clusters and all.
//
// A block is a thread of the operating system, so that `__shared__` can be `thread_local`; its CUDA
// threads are coroutines in it, which take turns at barriers. The blocks of a cluster run together,
// clusters one after the other. Shared memory starts out as NaNs. EMULATED_BACKWARDS lets the last
// thread go first, for which a missing barrier is another. What ends the process: threads that wait
// at different barriers, and a launch that asks for more than was arranged.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string_view>
#include <thread>
#include <tuple>
#include <vector>

#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ thread_local
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct __align__(16) uint4 {
    unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int min(int a, int b) { return std::min(a, b); }
inline int64_t min(int64_t a, int64_t b) { return std::min(a, b); }

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace minitron::cuda {
inline thread_local __align__(16) char minitron_shared_memory[232448];
}

namespace emulation {

using minitron::cuda::minitron_shared_memory;
constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;
constexpr int kMostBlocks = 8;
constexpr size_t kStackBytes = 1 << 16;

[[noreturn]] inline void fail(const char* why) {
    std::fprintf(stderr, "CUDA emulation: %s\n", why);
    std::abort();
}

// What the blocks of a cluster have in common.
struct Cluster {
    explicit Cluster(int blocks) : blocks(blocks), arrivals(blocks) {}
    int blocks;
    std::barrier<> arrivals;
    char* shared[kMostBlocks] = {};
};

struct Barrier {
    int waiting = 0;
    unsigned generation = 0;
    void wait(int count);
};

class Block {
  public:
    Block(Cluster& cluster, int rank, int threads)
        : cluster(cluster), rank(rank), threads(threads) {
        cluster.shared[rank] = minitron_shared_memory;
        std::memset(minitron_shared_memory, 0xff, sizeof(minitron_shared_memory));
    }

    // Runs f() once for every thread.
    template <typename F>
    void run(const F& f) {
        static std::unique_ptr<char[]> stacks[kMostBlocks];
        if (!stacks[rank]) stacks[rank].reset(new char[kMostThreads * kStackBytes]);
        std::vector<ucontext_t> starts(threads);
        std::vector<bool> started(threads);
        resume_.resize(threads);
        finished_.assign(threads, false);
        body_ = [](void* f) { (*static_cast<const F*>(f))(); };
        argument_ = const_cast<F*>(&f);
        const bool backwards = std::getenv("EMULATED_BACKWARDS");
        for (int left = threads; left > 0;) {
            progress = false;
            for (int turn = 0; turn < threads; ++turn) {
                const int thread = backwards ? threads - 1 - turn : turn;
                if (finished_[thread]) continue;
                threadIdx = dim3(thread);
                if (_setjmp(scheduler_)) {  // the thread waits, or has finished
                    left -= finished_[thread];
                    continue;
                }
                if (started[thread]) _longjmp(resume_[thread], 1);
                started[thread] = progress = true;
                getcontext(&starts[thread]);
                starts[thread].uc_stack.ss_sp = stacks[rank].get() + thread * kStackBytes;
                starts[thread].uc_stack.ss_size = kStackBytes;
                makecontext(&starts[thread], &Block::enter, 0);
                setcontext(&starts[thread]);
            }
            if (!progress) fail("threads wait at different barriers");
        }
    }

    void yield() {
        if (!_setjmp(resume_[threadIdx.x])) _longjmp(scheduler_, 1);
    }

    Cluster& cluster;
    const int rank, threads;
    bool progress = false;
    Barrier all, warps[kMostThreads / kWarp];
    unsigned exchanged[kMostThreads];

  private:
    static void enter();

    jmp_buf scheduler_;
    struct Resume {
        jmp_buf buffer;
        operator __jmp_buf_tag*() { return buffer; }
    };
    std::vector<Resume> resume_;
    std::vector<bool> finished_;
    void (*body_)(void*);
    void* argument_;
};

inline thread_local Block* block;

inline void Block::enter() {
    block->body_(block->argument_);
    block->finished_[threadIdx.x] = block->progress = true;
    _longjmp(block->scheduler_, 1);
}

inline void Barrier::wait(int count) {
    const unsigned own = generation;
    if (++waiting == count) {
        waiting = 0;
        ++generation;
        block->progress = true;
        return;
    }
    while (generation == own) block->yield();
}

inline std::map<const void*, size_t>& shared_limits() {
    static std::map<const void*, size_t> limits;
    return limits;
}

}  // namespace emulation

inline void __syncthreads() { emulation::block->all.wait(emulation::block->threads); }

inline float __shfl_xor_sync(unsigned, float value, int offset) {
    auto& block = *emulation::block;
    auto& warp = block.warps[threadIdx.x / emulation::kWarp];
    block.exchanged[threadIdx.x] = __float_as_uint(value);
    warp.wait(emulation::kWarp);
    const float other = __uint_as_float(block.exchanged[threadIdx.x ^ offset]);
    warp.wait(emulation::kWarp);
    return other;
}

inline unsigned __shfl_up_sync(unsigned, unsigned value, int offset) {
    auto& block = *emulation::block;
    auto& warp = block.warps[threadIdx.x / emulation::kWarp];
    block.exchanged[threadIdx.x] = value;
    warp.wait(emulation::kWarp);
    const bool has_other = static_cast<int>(threadIdx.x % emulation::kWarp) >= offset;
    const unsigned other = block.exchanged[threadIdx.x - (has_other ? offset : 0)];
    warp.wait(emulation::kWarp);
    return other;
}

inline int atomicAdd(int* to, int amount) {
    const int before = *to;  // the threads of a block take turns
    *to += amount;
    return before;
}

inline unsigned atomicOr(unsigned* to, unsigned bits) {
    const unsigned before = *to;
    *to |= bits;
    return before;
}

template <typename T>
T __ldcs(const T* from) {
    return *from;
}

template <typename T>
void __stcs(T* to, T value) {
    *to = value;
}

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        dim3 clusterDim;
    } val;
};

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

struct cudaFuncAttributes {
    int ptxVersion;
};

inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }

inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

// EMULATED_SHARED_BYTES makes small problems take the ways of large ones.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    const char* bytes = std::getenv("EMULATED_SHARED_BYTES");
    *value = bytes ? std::atoi(bytes) : sizeof(emulation::minitron_shared_memory);
    return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
    attributes->ptxVersion = 90;
    return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
    emulation::shared_limits()[reinterpret_cast<const void*>(kernel)] = bytes;
    return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

// EMULATED_WITHOUT_CLUSTERS is a device that cannot tell, or on which none fits.
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel*, const cudaLaunchConfig_t*) {
    const char* without = std::getenv("EMULATED_WITHOUT_CLUSTERS");
    *clusters = without ? 0 : 1;
    return without && std::string_view(without) == "error" ? cudaErrorInvalidValue : cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    const auto limit = emulation::shared_limits().find(reinterpret_cast<const void*>(kernel));
    const size_t most = limit == emulation::shared_limits().end()
                            ? 48 << 10
                            : std::max<size_t>(limit->second, 48 << 10);
    const int threads = config->blockDim.x;
    const int blocks = config->numAttrs ? config->attrs->val.clusterDim.x : 1;
    if (config->dynamicSmemBytes > most) emulation::fail("more shared memory than was arranged");
    if (threads % emulation::kWarp || threads > emulation::kMostThreads) {
        emulation::fail("not a number of threads");
    }
    if (config->gridDim.x % blocks) emulation::fail("the grid is not made of whole clusters");
    const std::tuple<Parameters...> parameters(arguments...);
    for (unsigned first = 0; first < config->gridDim.x; first += blocks) {
        emulation::Cluster cluster(blocks);
        const auto run = [&](int rank) {
            blockIdx = dim3(first + rank);
            blockDim = config->blockDim;
            gridDim = config->gridDim;
            emulation::Block block(cluster, rank, threads);
            emulation::block = &block;
            block.run([&] { std::apply(kernel, parameters); });
        };
        std::vector<std::thread> others;
        for (int rank = 1; rank < blocks; ++rank) others.emplace_back(run, rank);
        run(0);
        for (auto& other : others) other.join();
    }
    return cudaSuccess;
}
