// What a GPU thread does with the logits of a row that it is handed.
//
// Statistics are taken online: references are the largest logits so far, and where a larger one
// comes, the sums move to it. Nothing here needs a GPU, so that it can be tested without one.

#pragma once

#include "kl_merge.h"

namespace minitron {

constexpr float kLog2E = 1.44269504088896341f;

// 2^z to two units in the last place; what is below 2^−126 becomes 0.
MINITRON_INLINE float kl_exp2(float z) {
#if defined(__CUDACC__) && defined(__CUDA_ARCH__)
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(z));
    return r;
#else
    return exp2f(z);
#endif
}

// Moves running statistics to higher references.
template <bool kAll>
MINITRON_INLINE void kl_raise(KLStatistics& r, float m, float n, float scale) {
    const float x = r.m - m, y = r.n - n;
    const float u = kl_exp2(x * scale), w = kl_exp2(y * scale);
    r.c = kl_moved(r.c, r.b, w, y, x);
    r.b *= w;
    if constexpr (kAll) {
        r.d = kl_moved(r.d, r.a, u, x, y);
        r.e *= kl_exp2(x * kLog2E);
    }
    r.a *= u;
    r.m = m;
    r.n = n;
}

// Adds logits to running statistics, of which kl_finish makes those of kl_merge.h. `scale` is
// log2(e) / τ; kAll takes also what reverse KL and, where τ ≠ 1, cross-entropy need. −inf counts
// nothing, but for the student where the teacher finds the token possible.
template <bool kAll, int kCount>
MINITRON_INLINE void kl_add(KLStatistics& r, const float (&student)[kCount],
                            const float (&teacher)[kCount], float scale) {
    float m = r.m, n = r.n;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        m = fmaxf(m, student[i]);
        n = fmaxf(n, teacher[i]);
    }
    if (m > r.m || n > r.n) kl_raise<kAll>(r, m, n, scale);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const float x = student[i] - r.m, y = teacher[i] - r.n;
        const float p = kl_exp2(x * scale), q = kl_exp2(y * scale);
        r.a += p;
        r.b += q;
        r.c = q > 0.f ? fmaf(q, y - x, r.c) : r.c;
        if constexpr (kAll) {
            r.d = p > 0.f ? fmaf(p, x - y, r.d) : r.d;
            r.e += kl_exp2(x * kLog2E);
        }
    }
}

// While they run, cross terms are in logits, not in logits / τ.
template <bool kAll>
MINITRON_INLINE KLStatistics kl_finish(const KLStatistics& r, float temperature) {
    return {r.m, r.n, r.a, r.b, r.c / temperature, r.d / temperature, kAll ? r.e : r.a, r.l};
}

// The gradient by the student's logits: with p and q the probabilities at τ and p₁ the student's at
// τ = 1, it is
//
//     α p − β q + ρ p (ln p − ln q − KL(p ‖ q)) + γ p₁ − λ [column is the label]
//
// Here the normalisers are part of α, β, ρ and γ, which multiply bare exponentials.
struct KLGradient {
    float m, n, scale;
    float alpha, beta, rho, gamma, lambda, centre;
    float least;  // p above which the term of reverse KL counts
};

// Of a row with these statistics over the whole vocabulary, where its four losses weigh this much.
MINITRON_INLINE KLGradient kl_gradient(const KLStatistics& r, const float (&weights)[kNumLosses],
                                       float temperature) {
    KLGradient g;
    g.m = r.m;
    g.n = r.n;
    g.scale = kLog2E / temperature;
    g.lambda = weights[2];
    g.gamma = (g.lambda + 2 * (r.m + logf(r.e)) * weights[3]) / r.e;
    g.alpha = weights[0] / temperature / r.a;
    g.beta = weights[0] / temperature / r.b;
    g.rho = weights[1] / temperature / temperature / r.a;
    g.centre = r.d / r.a * temperature;            // mean of x − y under p: the normalisers cancel
    g.least = weights[1] == 0.f ? INFINITY : 0.f;  // an infinite divergence that nobody weighs
    if (temperature == 1.f) {
        g.alpha += g.gamma;
        g.gamma = 0.f;
    }
    return g;
}

// All but the label's term.
template <bool kAll>
MINITRON_INLINE float kl_slope(const KLGradient& g, float student, float teacher) {
    const float x = student - g.m, y = teacher - g.n;
    const float p = kl_exp2(x * g.scale), q = kl_exp2(y * g.scale);
    float slope = fmaf(g.alpha, p, -g.beta * q);
    if constexpr (kAll) {
        slope = p > g.least ? fmaf(p, g.rho * (x - y - g.centre), slope) : slope;
        slope = fmaf(g.gamma, kl_exp2(x * kLog2E), slope);
    }
    return slope;
}

}  // namespace minitron
