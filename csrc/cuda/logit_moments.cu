// The sweeps of minitron/ops/logit_moments.py, for GPUs: a row of logits to a block.

#include "kernels.h"
#include "kl_row.h"
#include "logit_rows.cuh"

namespace minitron::cuda {
namespace {

// Of any set of columns: how many count, both means, Σ s′², Σ t′² and Σ (s′ − t′)² about them.
// Sets merge, as in "Updating formulae and a pairwise algorithm for computing sample variances",
// Chan et al. 1979.
struct Moments {
    float n = 0, student = 0, teacher = 0, student_square = 0, teacher_square = 0, difference = 0;

    __device__ void merge(const Moments& other) {
        if (other.n == 0.f) return;
        const float share = other.n / (n + other.n), weight = n * share;
        const float s = other.student - student, t = other.teacher - teacher;
        n += other.n;
        student += share * s;
        teacher += share * t;
        student_square += other.student_square + weight * s * s;
        teacher_square += other.teacher_square + weight * t * t;
        difference += other.difference + weight * (s - t) * (s - t);
    }
};

__device__ bool counts(float student, float teacher) {
    return student != -INFINITY && teacher != -INFINITY;  // NaN does, to be seen
}

// Of a piece, less what is common to the row.
__device__ Moments of_piece(const float (&s)[kWidth], const float (&t)[kWidth],
                            const float (&origin)[2]) {
    Moments r;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        if (!counts(s[i], t[i])) continue;
        r.n += 1;
        r.student += s[i] - origin[0];
        r.teacher += t[i] - origin[1];
    }
    if (r.n == 0.f) return r;
    r.student /= r.n;
    r.teacher /= r.n;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        if (!counts(s[i], t[i])) continue;
        const float x = s[i] - origin[0] - r.student, y = t[i] - origin[1] - r.teacher;
        r.student_square = fmaf(x, x, r.student_square);
        r.teacher_square = fmaf(y, y, r.teacher_square);
        r.difference = fmaf(x - y, x - y, r.difference);
    }
    return r;
}

// Another lane's value.
__device__ Moments shuffled(const Moments& own, int offset) {
    const auto other = [&](float x) { return __shfl_xor_sync(0xffffffffu, x, offset); };
    return {other(own.n),
            other(own.student),
            other(own.teacher),
            other(own.student_square),
            other(own.teacher_square),
            other(own.difference)};
}

// All threads' moments, merged in a fixed order. The scratch memory holds one a warp.
__device__ Moments merge_over_block(Moments r, Moments* scratch) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) r.merge(shuffled(r, offset));
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = r;
    __syncthreads();
    r = scratch[0];
    for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
        r.merge(scratch[warp]);
    }
    return r;
}

// The moments of the columns here, [tokens, 6].
template <typename S, typename T>
__global__ void __launch_bounds__(kMaxThreads, 2)
    moments_kernel(const __grid_constant__ LogitKLArguments args, Moments* out) {
    const int64_t row = blockIdx.x;
    Moments r;
    if (!is_masked(args, row)) {
        const LogitReader<S, T> logits(args, row);
        // Logits are taken relative to one of the row's, so that offsets cost no digits.
        float s[kWidth], t[kWidth], origin[2] = {kNoColumns, kNoColumns};
        unpack(logits.student.template load<false>(0, -INFINITY), s);
        unpack(logits.teacher.template load<false>(0, -INFINITY), t);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            origin[0] = fmaxf(origin[0], s[i]);
            origin[1] = fmaxf(origin[1], t[i]);
        }
#pragma unroll
        for (float& x : origin) x = x == kNoColumns ? 0.f : x;
        for_each_pair<false>(logits.student, logits.teacher, 0, logits.student.packs(), -INFINITY,
                             [&](int, const Pack<S>& student, const Pack<T>& teacher) {
                                 unpack(student, s);
                                 unpack(teacher, t);
                                 r.merge(of_piece(s, t, origin));
                             });
        r = merge_over_block(r, reinterpret_cast<Moments*>(shared_memory()));
        r.student += origin[0];
        r.teacher += origin[1];
        if (r.n == 0.f) r = Moments();
    }
    if (threadIdx.x == 0) out[row] = r;
}

// A linear combination of s′ and t′, and the gradient of the cross-entropy where there are labels.
template <typename S, typename T>
__global__ void __launch_bounds__(kMaxThreads, 2)
    gradient_kernel(const __grid_constant__ LogitKLArguments args,
                    const __grid_constant__ LogitMomentsGradient gradient) {
    const int64_t row = blockIdx.x;
    S* const to = gradient_row<S>(gradient.out, row);
    const int columns = static_cast<int>(args.columns), padding = static_cast<int>(args.padding);
    if (is_masked(args, row)) {
        zero(to, 0, columns + padding);
        return;
    }
    const LogitReader<S, T> logits(args, row);
    const RowWriter<S> writer(to, columns);
    const LogitMomentsCoefficients c = gradient.coefficients[row];
    const int label = label_column(args.labels, row, args.label_offset, columns);
    float lambda = 0.f, reference = 0.f, scale = 0.f;
    if (args.labels) {
        const auto& r = reinterpret_cast<const KLStatistics*>(gradient.normalizers)[row];
        lambda = gradient.out.weights[row];
        reference = r.m;
        scale = lambda / r.e;
    }
    for_each_pair<true>(logits.student, logits.teacher, 0, logits.student.packs(), -INFINITY,
                        [&](int index, const Pack<S>& student, const Pack<T>& teacher) {
                            float s[kWidth], t[kWidth], slope[kWidth];
                            unpack(student, s);
                            unpack(teacher, t);
#pragma unroll
                            for (int i = 0; i < kWidth; ++i) {
                                const float combined = c.by_student * (s[i] - c.student_mean) +
                                                       c.by_teacher * (t[i] - c.teacher_mean);
                                slope[i] = counts(s[i], t[i]) ? combined : 0.f;
                                if (args.labels)
                                    slope[i] += scale * kl_exp2((s[i] - reference) * kLog2E);
                            }
                            subtract_at_label(slope, index, label, lambda);
                            writer.store(index, slope);
                        });
    zero(to, columns, columns + padding);
}

Grid row_grid(const LogitKLArguments& args, int64_t tokens) {
    const int threads = threads_for(args.columns);
    return {tokens, threads, threads / kWarp * sizeof(Moments)};
}

}  // namespace

const char* logit_moments(const LogitKLArguments& args, int64_t tokens, float* moments,
                          void* stream) {
    return message(by_dtype(args, [&](auto student, auto teacher) {
        return launch(moments_kernel<decltype(student), decltype(teacher)>, row_grid(args, tokens),
                      stream, args, reinterpret_cast<Moments*>(moments));
    }));
}

const char* logit_moments_gradient(const LogitKLArguments& args,
                                   const LogitMomentsGradient& gradient, void* stream) {
    return message(by_dtype(args, [&](auto student, auto teacher) {
        return launch(gradient_kernel<decltype(student), decltype(teacher)>,
                      row_grid(args, gradient.out.tokens), stream, args, gradient);
    }));
}

}  // namespace minitron::cuda
