// What a token's logits are condensed into, and how two such condensates are merged.
//
// With s the student's logits, t the teacher's, over any set of columns, with references m and n
// that are close to max s and max t, and with x = (s−m)/τ and y = (t−n)/τ:
//
//     a = Σ e^x    b = Σ e^y    c = Σ e^y (y−x)    d = Σ e^x (x−y)
//     e = Σ e^(s−m)             l = s[label], 0 where the label is elsewhere
//
// Merging is associative and commutative and has a neutral element, so one function serves tiles,
// thread blocks and ranks. Logits only ever meet their reference, and references each other:
// offsets that all logits share cost no digits.

#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define MINITRON_INLINE __host__ __device__ __forceinline__
#else
#define MINITRON_INLINE static inline  // static: files built for other instruction sets keep theirs
#endif

namespace minitron {

// The reference of no columns, or of −inf alone: finite, so that differences of it are defined, and
// so low that the weight of such a set is exactly zero in any merge.
constexpr float kNoColumns = -1e30f;
constexpr int kNumStatistics = 8;
constexpr int kNumLosses = 4;

struct KLStatistics {
    float m, n, a, b, c, d, e, l;
};

MINITRON_INLINE KLStatistics kl_neutral() { return {kNoColumns, kNoColumns, 0, 0, 0, 0, 0, 0}; }

// e^shift, without evaluating it for the set that has the common reference.
MINITRON_INLINE float kl_weight(float shift) { return shift == 0.f ? 1.f : expf(shift); }

// A cross term of one set moved to common references; shifts are (own − common)/τ.
MINITRON_INLINE float kl_moved(float cross, float sum, float weight, float shift, float other) {
    return weight > 0.f ? weight * (cross + sum * (shift - other)) : 0.f;
}

// The same statistics with references m and n, which are not below their own.
MINITRON_INLINE KLStatistics kl_with_references(const KLStatistics& u, float m, float n,
                                                float temperature) {
    const float um = (u.m - m) / temperature, un = (u.n - n) / temperature;
    const float student = kl_weight(um), teacher = kl_weight(un);
    return {m,
            n,
            u.a * student,
            u.b * teacher,
            kl_moved(u.c, u.b, teacher, un, um),
            kl_moved(u.d, u.a, student, um, un),
            u.e * kl_weight(u.m - m),
            u.l};
}

MINITRON_INLINE KLStatistics kl_merge(const KLStatistics& u, const KLStatistics& v,
                                      float temperature) {
    const float m = u.m > v.m ? u.m : v.m, n = u.n > v.n ? u.n : v.n;
    const KLStatistics p = kl_with_references(u, m, n, temperature);
    const KLStatistics q = kl_with_references(v, m, n, temperature);
    return {m, n, p.a + q.a, p.b + q.b, p.c + q.c, p.d + q.d, p.e + q.e, p.l + q.l};
}

// Per-token losses in nats, of the statistics over the whole vocabulary.
struct KLLosses {
    float forward_kl;     // KL(teacher || student) at τ
    float reverse_kl;     // KL(student || teacher) at τ
    float cross_entropy;  // of the student with the labels at τ = 1
    float z_loss;         // (ln Σ e^s)²
};

MINITRON_INLINE KLLosses kl_losses(const KLStatistics& r) {
    const float ratio = logf(r.a / r.b), log_e = logf(r.e), log_sum = r.m + log_e;
    return {r.c / r.b + ratio, r.d / r.a - ratio, (r.m - r.l) + log_e, log_sum * log_sum};
}

}  // namespace minitron
