// The choice of minitron/ops/top_tokens.py, for GPUs: a row of logits to a block.
//
// As on a CPU: the k-th largest of many groups' maxima cannot be above the k-th largest logit, and
// is not far below it. The first read of a row yields maxima and normaliser; the second collects
// what reaches that bound, among which bisection over the bits of a float finds the k-th largest;
// the third writes the chosen in the order of columns. Second and third are left to the L2 cache.

#include <cmath>

#include "common.cuh"
#include "kernels.h"
#include "kl_row.h"

namespace minitron::cuda {
namespace {

constexpr int kCollected = 4096;  // many more than tokens that are wanted; if not, rows are counted
constexpr int kScratchFloats = kMaxThreads / kWarp;

// Logits in order as integers in order, none of which is 0. NaN is with +inf, −0 with 0.
template <typename T>
__device__ unsigned key_of(float x) {
    const unsigned bits = __float_as_uint(std::isnan(x) ? INFINITY : x + 0.f);
    return (bits >> 31 ? ~bits : bits | 0x80000000u) >> (32 - 8 * sizeof(T));
}

// The largest bound that `wanted` keys reach, or `low` if fewer do; none reaches `high`. The
// function count(bound) is the same for all threads.
template <typename Count>
__device__ unsigned bound_of_largest(unsigned low, unsigned high, int wanted, const Count& count) {
    while (high - low > 1) {
        const unsigned middle = low + (high - low) / 2;
        const int reached = count(middle);
        if (reached == wanted) return middle;
        (reached > wanted ? low : high) = middle;
    }
    return low;
}

__device__ int count_over_block(int own, float* scratch) {
    float total[1] = {static_cast<float>(own)};  // exact below 2²⁴
    sum_over_block(total, scratch);
    return static_cast<int>(total[0]);
}

// Two counts below 2¹⁶, added up and compared as one.
struct Counts {
    unsigned above, equal;
};

// Of the threads before this one, and of all. The scratch memory holds a number a warp.
__device__ Counts counts_before(const Counts& own, unsigned* scratch, Counts& all) {
    const int lane = threadIdx.x % kWarp, own_warp = threadIdx.x / kWarp;
    const unsigned packed = own.above << 16 | own.equal;
    unsigned sum = packed;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
        const unsigned other = __shfl_up_sync(0xffffffffu, sum, offset);
        if (lane >= offset) sum += other;
    }
    __syncthreads();  // an earlier sum may still be read
    if (lane == kWarp - 1) scratch[own_warp] = sum;
    __syncthreads();
    unsigned before = sum - packed, total = 0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
        if (warp < own_warp) before += scratch[warp];
        total += scratch[warp];
    }
    all = {total >> 16, total & 0xffff};
    return {before >> 16, before & 0xffff};
}

// Writes the logits and ids of `wanted` columns in ascending order: those above the bound and, of
// those at it, the first.
template <typename T>
__device__ void write_chosen(const RowReader<T>& logits, unsigned bound, int wanted, int above,
                             int64_t first_id, unsigned* scratch, float* values, float* ids) {
    const int at_bound = wanted - above;
    int seen_above = 0, seen_equal = 0;  // in the pieces so far
    for (int start = 0; start < logits.packs(); start += blockDim.x) {
        const int index = start + threadIdx.x;
        float x[kWidth];
        unsigned keys[kWidth] = {};
        Counts own = {};
        if (index < logits.packs()) {
            unpack(logits.template load<false>(index, -INFINITY), x);
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                if (index * kWidth + i < logits.columns) keys[i] = key_of<T>(x[i]);
                own.above += keys[i] > bound;
                own.equal += keys[i] == bound;
            }
        }
        Counts all;
        const Counts before = counts_before(own, scratch, all);
        int higher = seen_above + static_cast<int>(before.above);
        int equal = seen_equal + static_cast<int>(before.equal);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            const bool is_above = keys[i] > bound, is_equal = keys[i] == bound;
            if (is_above || (is_equal && equal < at_bound)) {
                const int to = higher + min(equal, at_bound);
                values[to] = x[i];
                ids[to] = static_cast<float>(first_id + index * kWidth + i);
            }
            higher += is_above;
            equal += is_equal;
        }
        seen_above += static_cast<int>(all.above);
        seen_equal += static_cast<int>(all.equal);
        if (seen_above + min(seen_equal, at_bound) == wanted) return;
    }
}

// What a row puts forward: `out` [tokens, 2 + 2 slots].
template <typename T>
__global__ void __launch_bounds__(kMaxThreads, 2)
    candidates_kernel(const __grid_constant__ TopTokensArguments args, float* out) {
    const int64_t row = blockIdx.x;
    const int slots = static_cast<int>(args.slots), columns = static_cast<int>(args.columns);
    out += row * (2 + 2 * args.slots);
    float *const values = out + 2, *const ids = values + slots;
    const bool is_read = columns > 0 && (!args.mask || args.mask[row]);
    const int wanted = is_read ? min(slots, columns) : 0;
    for (int i = wanted + threadIdx.x; i < slots; i += blockDim.x) {
        values[i] = -INFINITY;
        ids[i] = -1.f;
    }
    if (!is_read) {
        if (threadIdx.x == 0) out[0] = kNoColumns, out[1] = 0.f;
        return;
    }
    const RowReader<T> logits(static_cast<const T*>(args.rows.data) + row * args.rows.stride,
                              columns);
    float* const scratch = reinterpret_cast<float*>(shared_memory());
    auto* const found = reinterpret_cast<int*>(scratch + kScratchFloats);
    auto* const collected = reinterpret_cast<unsigned*>(found + 1);  // keys
    if (threadIdx.x == 0) *found = 0;

    const float scale = kLog2E / args.temperature;
    float m = kNoColumns, sum = 0.f;
    unsigned largest[kWidth] =
        {};  // of groups of columns: this thread's, by their place in a piece
    for_each_piece<false>(logits, -INFINITY, [&](int, const Pack<T>& piece) {
        float x[kWidth], higher = m;
        unpack(piece, x);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) higher = fmaxf(higher, x[i]);
        sum *= kl_exp2((m - higher) * scale);
        m = higher;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            sum += kl_exp2((x[i] - m) * scale);
            const unsigned key = key_of<T>(x[i]);
            largest[i] = key > largest[i] ? key : largest[i];
        }
    });
    float maximum[1] = {m};
    reduce_block(maximum, scratch, [](float x, float y) { return fmaxf(x, y); });
    float total[1] = {sum * kl_weight((m - maximum[0]) / args.temperature)};
    sum_over_block(total, scratch);
    if (threadIdx.x == 0) out[0] = maximum[0], out[1] = total[0];

    const unsigned end = key_of<T>(INFINITY) + 1;
    const unsigned least = bound_of_largest(0, end, wanted, [&](unsigned bound) {
        int reached = 0;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) reached += largest[i] >= bound;
        return count_over_block(reached, scratch);
    });
    for_each_piece<false>(logits, -INFINITY, [&](int, const Pack<T>& piece) {
        float x[kWidth];
        unpack(piece, x);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            const unsigned key = key_of<T>(x[i]);
            if (key < least) continue;
            const int at = atomicAdd(found, 1);
            if (at < kCollected) collected[at] = key;
        }
    });
    __syncthreads();
    const int kept = *found;
    const auto count = [&](unsigned bound) {
        int reached = 0;
        if (kept <= kCollected) {
            for (int i = threadIdx.x; i < kept; i += blockDim.x) reached += collected[i] >= bound;
        } else {
            for_each_piece<false>(logits, -INFINITY, [&](int, const Pack<T>& piece) {
                float x[kWidth];
                unpack(piece, x);
#pragma unroll
                for (int i = 0; i < kWidth; ++i) reached += key_of<T>(x[i]) >= bound;
            });
        }
        return count_over_block(reached, scratch);
    };
    const unsigned bound = bound_of_largest(least, end, wanted, count);
    write_chosen(logits, bound, wanted, count(bound + 1), args.first_id,
                 reinterpret_cast<unsigned*>(scratch), values, ids);
}

}  // namespace

const char* top_candidates(const TopTokensArguments& args, float* out, void* stream) {
    const Grid grid = {args.tokens, threads_for(args.columns),
                       (kScratchFloats + 1 + kCollected) * sizeof(float)};
    return message(args.rows.dtype == Dtype::kFloat32
                       ? launch(candidates_kernel<float>, grid, stream, args, out)
                       : launch(candidates_kernel<BFloat16>, grid, stream, args, out));
}

}  // namespace minitron::cuda
