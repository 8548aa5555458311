// The second sweep and the gradient of minitron/ops/divergences.py, for CPUs.

#include "divergences.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "logit_gradient.h"

namespace minitron {
namespace CPU_CAPABILITY {
namespace {

// Probabilities up to this add nothing to a sum in fp32; above, those of a mixture are normal.
constexpr float kNegligible = 1e-30f;

// x ln(x/mixture), nothing where x is.
Vec information(const Vec& x, const Vec& mixture) {
    return Vec::blendv(Vec(0.f), x * log_of_normal(x / mixture), x > Vec(kNegligible));
}

struct Terms {
    Vec f, slope;  // f(p, q) and p ∂f/∂p
};

// `parameter` is β or α.
template <Divergence kKind>
Terms terms_of(const Vec& p, const Vec& q, float parameter) {
    if constexpr (kKind == Divergence::kTVD) {
        const Vec half(0.5f), none(0.f), excess = p - q;
        const Vec sign =
            Vec::blendv(none, half, excess > none) - Vec::blendv(none, half, excess < none);
        return {excess.abs() * half, p * sign};
    } else {
        const float share = kKind == Divergence::kSkewReverseKL ? 1.f - parameter : parameter;
        const Vec mixture = at::vec::fmadd(Vec(share), q, Vec(1.f - share) * p);
        if constexpr (kKind == Divergence::kJSD) {
            const Vec slope = Vec(1.f - share) * information(p, mixture);
            return {at::vec::fmadd(Vec(share), information(q, mixture), slope), slope};
        } else {
            const Vec both = Vec::blendv(Vec(0.f), p * (q / mixture), mixture > Vec(kNegligible));
            if constexpr (kKind == Divergence::kSkewKL) {
                return {information(q, mixture), Vec(share - 1.f) * both};
            } else {
                const Vec f = information(p, mixture);
                return {f, at::vec::fmadd(Vec(share), both, f)};
            }
        }
    }
}

// Turns a row's logits into probabilities.
struct Normalizer {
    float m, n, scale, by_student, by_teacher;

    Normalizer(const float* merged, float temperature)
        : m(merged[0]),
          n(merged[1]),
          scale(kLog2E / temperature),
          by_student(1.f / merged[2]),
          by_teacher(1.f / merged[3]) {}

    Vec student(const Vec& s) const { return exp2((s - Vec(m)) * Vec(scale)) * Vec(by_student); }
    Vec teacher(const Vec& t) const { return exp2((t - Vec(n)) * Vec(scale)) * Vec(by_teacher); }
};

template <Divergence kKind, typename S, typename T>
void sum_row(const S* s, const T* t, const DivergenceArguments& args, int64_t row, float& terms,
             float& slopes) {
    constexpr int64_t kTile = 4096;  // summed up in fp32
    const float* const merged = args.merged + row * kNumStatistics;
    if (std::isnan(merged[2] + merged[3])) {  // a logit is NaN, which the terms may not show
        terms = slopes = std::numeric_limits<float>::quiet_NaN();
        return;
    }
    const Normalizer normal(merged, args.logits.temperature);
    double term_sum = 0, slope_sum = 0;
    for (int64_t start = 0; start < args.logits.columns; start += kTile) {
        const int64_t end = std::min(start + kTile, args.logits.columns);
        Vec f(0.f), slope(0.f);
        const auto add = [&](const Vec& student, const Vec& teacher) {
            const Terms x =
                terms_of<kKind>(normal.student(student), normal.teacher(teacher), args.parameter);
            f = f + x.f;
            slope = slope + x.slope;
        };
        int64_t i = start;
        for (; i + kLanes <= end; i += kLanes) add(load(s + i), load(t + i));
        if (i < end) add(load(s + i, end - i, kNoColumns), load(t + i, end - i, kNoColumns));
        term_sum += reduce_add(f);
        slope_sum += reduce_add(slope);
    }
    terms = static_cast<float>(term_sum);
    slopes = static_cast<float>(slope_sum);
}

template <Divergence kKind, typename S, typename T>
void gradient_row(const S* s, const T* t, S* to, const DivergenceArguments& args,
                  const DivergenceGradient& gradient, int64_t row) {
    const auto& logits = args.logits;
    const auto& out = gradient.out;
    const float* const merged = args.merged + row * kNumStatistics;
    const Normalizer normal(merged, logits.temperature);
    const float lambda = logits.labels ? out.weights[out.tokens + row] : 0.f;
    const Vec mean_slope(gradient.mean_slope[row]);
    const Vec factor(out.weights[row] / logits.temperature), gamma(lambda / merged[6]);
    const auto f = [&](const Vec& student, const Vec& teacher) {
        const Vec p = normal.student(student);
        const Vec slope = terms_of<kKind>(p, normal.teacher(teacher), args.parameter).slope;
        const Vec g = factor * at::vec::fnmadd(p, mean_slope, slope);
        if (lambda == 0.f) return g;
        return at::vec::fmadd(gamma, exp2((student - Vec(normal.m)) * Vec(kLog2E)), g);
    };
    map_row_with_label(s, t, to, logits, lambda, row, f);
}

// Calls f<kKind>(student, teacher) with pointers to the row, for what the arguments ask.
template <typename F>
void specialise(const DivergenceArguments& args, const F& f) {
    const auto by_kind = [&](auto student, auto teacher) {
        const auto run = [&](auto kind) { f(kind, student, teacher); };
        switch (args.kind) {
            case Divergence::kJSD:
                return run(std::integral_constant<Divergence, Divergence::kJSD>());
            case Divergence::kSkewKL:
                return run(std::integral_constant<Divergence, Divergence::kSkewKL>());
            case Divergence::kSkewReverseKL:
                return run(std::integral_constant<Divergence, Divergence::kSkewReverseKL>());
            case Divergence::kTVD:
                return run(std::integral_constant<Divergence, Divergence::kTVD>());
        }
    };
    by_dtype(args.logits, by_kind);
}

}  // namespace

void divergence_sums(const DivergenceArguments& args, int64_t begin, int64_t end, float* terms,
                     float* slopes) {
    specialise(args, [&](auto kind, auto student, auto teacher) {
        for (int64_t row = begin; row < end; ++row) {
            terms[row] = slopes[row] = 0.f;
            if (args.logits.mask && !args.logits.mask[row]) continue;
            sum_row<kind()>(row_of<decltype(student)>(args.logits.student, row),
                            row_of<decltype(teacher)>(args.logits.teacher, row), args, row,
                            terms[row], slopes[row]);
        }
    });
}

void divergence_gradient(const DivergenceArguments& args, const DivergenceGradient& gradient,
                         int64_t begin, int64_t end) {
    specialise(args, [&](auto kind, auto student, auto teacher) {
        using S = decltype(student);
        for (int64_t row = begin; row < end; ++row) {
            S* const to = static_cast<S*>(gradient.out.data) + row * gradient.out.stride;
            if (args.logits.mask && !args.logits.mask[row]) {
                zero(to, args.logits.columns + args.logits.padding);
                continue;
            }
            gradient_row<kind()>(row_of<S>(args.logits.student, row),
                                 row_of<decltype(teacher)>(args.logits.teacher, row), to, args,
                                 gradient, row);
        }
    });
    streaming_fence();
}

}  // namespace CPU_CAPABILITY
}  // namespace minitron
