// The sweeps of minitron/ops/divergences.py, for GPUs: a row of logits to a block.

#include <cmath>
#include <type_traits>

#include "kernels.h"
#include "kl_row.h"
#include "logit_rows.cuh"

namespace minitron::cuda {
namespace {

// Of a column: f and p ∂f/∂p.
struct Term {
    float value, slope;
};

// Probabilities up to this add nothing to a sum in fp32; above, those of a mixture are normal.
constexpr float kNegligible = 1e-30f;

// x ln(x/mixture); nothing where x is nothing.
__device__ float information(float x, float mixture) {
    return x > kNegligible ? x * logf(x / mixture) : 0.f;
}

template <Divergence kKind>
__device__ Term term(float p, float q, float parameter) {
    if constexpr (kKind == Divergence::kTVD) {
        return {fabsf(p - q) / 2, p > q ? p / 2 : p < q ? -p / 2 : 0.f};
    }
    const float share = kKind == Divergence::kSkewReverseKL ? 1 - parameter : parameter;
    const float mixture = share * q + (1 - share) * p;
    if constexpr (kKind == Divergence::kJSD) {
        const float by_student = (1 - share) * information(p, mixture);
        return {share * information(q, mixture) + by_student, by_student};
    }
    const float both = mixture > kNegligible ? p * (q / mixture) : 0.f;
    if constexpr (kKind == Divergence::kSkewKL) {
        return {information(q, mixture), (share - 1) * both};
    }
    const float value = information(p, mixture);
    return {value, value + share * both};
}

// Calls f(Kind) with the kind as a constant.
template <typename F>
__device__ void with_kind(Divergence kind, const F& f) {
    switch (kind) {
        case Divergence::kJSD:
            return f(std::integral_constant<Divergence, Divergence::kJSD>());
        case Divergence::kSkewKL:
            return f(std::integral_constant<Divergence, Divergence::kSkewKL>());
        case Divergence::kSkewReverseKL:
            return f(std::integral_constant<Divergence, Divergence::kSkewReverseKL>());
        case Divergence::kTVD:
            return f(std::integral_constant<Divergence, Divergence::kTVD>());
    }
}

// Turns logits into probabilities.
struct Softmax {
    float reference, scale, normalizer;

    __device__ void apply(float (&x)[kWidth]) const {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            x[i] = kl_exp2((x[i] - reference) * scale) * normalizer;
        }
    }
};

// Σ f and Σ p ∂f/∂p of the columns here: `out` [2, tokens].
template <typename S, typename T>
__global__ void __launch_bounds__(kMaxThreads, 2)
    sums_kernel(const __grid_constant__ DivergenceArguments args, int64_t tokens, float* out) {
    const int64_t row = blockIdx.x;
    float sums[2] = {};
    if (!is_masked(args.logits, row)) {
        const LogitReader<S, T> logits(args.logits, row);
        const auto& r = reinterpret_cast<const KLStatistics*>(args.merged)[row];
        const float scale = kLog2E / args.logits.temperature;
        const Softmax of_student = {r.m, scale, 1 / r.a}, of_teacher = {r.n, scale, 1 / r.b};
        for_each_pair<false>(logits.student, logits.teacher, 0, logits.student.packs(), -INFINITY,
                             [&](int, const Pack<S>& student, const Pack<T>& teacher) {
                                 float p[kWidth], q[kWidth];
                                 unpack(student, p);
                                 unpack(teacher, q);
                                 of_student.apply(p);
                                 of_teacher.apply(q);
                                 with_kind(args.kind, [&](auto kind) {
#pragma unroll
                                     for (int i = 0; i < kWidth; ++i) {
                                         const Term t = term<decltype(kind)::value>(p[i], q[i],
                                                                                    args.parameter);
                                         sums[0] += t.value;
                                         sums[1] += t.slope;
                                     }
                                 });
                             });
        sum_over_block(sums, reinterpret_cast<float*>(shared_memory()));
        if (std::isnan(r.a + r.b)) sums[0] = sums[1] = NAN;  // a logit is, which terms may not show
    }
    if (threadIdx.x > 0) return;
    out[row] = sums[0];
    out[tokens + row] = sums[1];
}

// (p ∂f/∂p − p Σ p ∂f/∂p)/τ times the divergence's weight, and the gradient of the cross-entropy
// where there are labels.
template <typename S, typename T>
__global__ void __launch_bounds__(kMaxThreads, 2)
    gradient_kernel(const __grid_constant__ DivergenceArguments args,
                    const __grid_constant__ DivergenceGradient gradient) {
    const int64_t row = blockIdx.x;
    S* const to = gradient_row<S>(gradient.out, row);
    const int columns = static_cast<int>(args.logits.columns);
    const int padding = static_cast<int>(args.logits.padding);
    if (is_masked(args.logits, row)) {
        zero(to, 0, columns + padding);
        return;
    }
    const LogitReader<S, T> logits(args.logits, row);
    const RowWriter<S> writer(to, columns);
    const auto& r = reinterpret_cast<const KLStatistics*>(args.merged)[row];
    const float scale = kLog2E / args.logits.temperature;
    const Softmax of_student = {r.m, scale, 1 / r.a}, of_teacher = {r.n, scale, 1 / r.b};
    const float mean_slope = gradient.mean_slope[row];
    const float weight = gradient.out.weights[row] / args.logits.temperature;
    const int label = label_column(args.logits.labels, row, args.logits.label_offset, columns);
    const float lambda = args.logits.labels ? gradient.out.weights[gradient.out.tokens + row] : 0.f;
    const Softmax unit = {r.m, kLog2E, lambda / r.e};  // its probabilities times their weight
    for_each_pair<true, false>(logits.student, logits.teacher, 0, logits.student.packs(), -INFINITY,
                               [&](int index, const Pack<S>& student, const Pack<T>& teacher) {
                                   float p[kWidth], q[kWidth], slope[kWidth];
                                   unpack(student, p);
                                   unpack(teacher, q);
                                   of_student.apply(p);
                                   of_teacher.apply(q);
                                   with_kind(args.kind, [&](auto kind) {
#pragma unroll
                                       for (int i = 0; i < kWidth; ++i) {
                                           const Term t = term<decltype(kind)::value>(
                                               p[i], q[i], args.parameter);
                                           slope[i] = weight * (t.slope - p[i] * mean_slope);
                                       }
                                   });
                                   if (args.logits.labels) {
                                       unpack(student, p);
                                       unit.apply(p);
#pragma unroll
                                       for (int i = 0; i < kWidth; ++i) slope[i] += p[i];
                                       subtract_at_label(slope, index, label, lambda);
                                   }
                                   writer.store(index, slope);
                               });
    zero(to, columns, columns + padding);
}

Grid row_grid(const LogitKLArguments& args, int64_t tokens) {
    const int threads = threads_for(args.columns);
    return {tokens, threads, threads / kWarp * 2 * sizeof(float)};
}

}  // namespace

const char* divergence_sums(const DivergenceArguments& args, int64_t tokens, float* sums,
                            void* stream) {
    return message(by_dtype(args.logits, [&](auto student, auto teacher) {
        return launch(sums_kernel<decltype(student), decltype(teacher)>,
                      row_grid(args.logits, tokens), stream, args, tokens, sums);
    }));
}

const char* divergence_gradient(const DivergenceArguments& args, const DivergenceGradient& gradient,
                                void* stream) {
    return message(by_dtype(args.logits, [&](auto student, auto teacher) {
        return launch(gradient_kernel<decltype(student), decltype(teacher)>,
                      row_grid(args.logits, gradient.out.tokens), stream, args, gradient);
    }));
}

}  // namespace minitron::cuda
