// What a token's logits are condensed into, and how two such condensates are merged.
//
// With s the student's logits, t the teacher's, x = s log₂e/τ and y = t log₂e/τ, over any set of
// columns, and with references m and n that are close to max x and max y:
//
//     a = Σ 2^(x−m)                        b = Σ 2^(y−n)
//     c = Σ 2^(y−n) [(y−n) − (x−m)]        d = Σ 2^(x−m) [(x−m) − (y−n)]
//     e = Σ 2^(τx−τm) = Σ e^s / 2^(τm)     l = s[label], 0 where the label is elsewhere
//
// Merging is associative and commutative and has a neutral element, so one function serves tiles,
// thread blocks and ranks. References only ever meet references and logits their own reference,
// by a fused multiply-add: offsets that all logits share cost no digits.

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
constexpr float kLog2E = 1.44269504088896341f;
constexpr double kLn2 = 0.693147180559945309;

struct KLStatistics {
    float m, n, a, b, c, d, e, l;
};

MINITRON_INLINE KLStatistics kl_neutral() { return {kNoColumns, kNoColumns, 0, 0, 0, 0, 0, 0}; }

// 2^difference, without evaluating it for the set that has the reference.
MINITRON_INLINE float kl_weight(float difference) {
    return difference == 0.f ? 1.f : exp2f(difference);
}

// A cross term of one set moved to common references; shifts are own − common.
MINITRON_INLINE float kl_moved(float cross, float sum, float weight, float shift, float other) {
    return weight > 0.f ? weight * (cross + sum * (shift - other)) : 0.f;
}

MINITRON_INLINE KLStatistics kl_merge(const KLStatistics& u, const KLStatistics& v,
                                      float temperature) {
    KLStatistics r;
    r.m = u.m > v.m ? u.m : v.m;
    r.n = u.n > v.n ? u.n : v.n;
    const float um = u.m - r.m, un = u.n - r.n, vm = v.m - r.m, vn = v.n - r.n;
    const float u_student = kl_weight(um), v_student = kl_weight(vm);
    const float u_teacher = kl_weight(un), v_teacher = kl_weight(vn);
    r.a = u.a * u_student + v.a * v_student;
    r.b = u.b * u_teacher + v.b * v_teacher;
    r.c = kl_moved(u.c, u.b, u_teacher, un, um) + kl_moved(v.c, v.b, v_teacher, vn, vm);
    r.d = kl_moved(u.d, u.a, u_student, um, un) + kl_moved(v.d, v.a, v_student, vm, vn);
    r.e = u.e * kl_weight(um * temperature) + v.e * kl_weight(vm * temperature);
    r.l = u.l + v.l;
    return r;
}

// Per-token losses in nats, of the statistics over the whole vocabulary.
struct KLLosses {
    float forward_kl;     // KL(teacher || student) at τ
    float reverse_kl;     // KL(student || teacher) at τ
    float cross_entropy;  // of the student with the labels at τ = 1
    float z_loss;         // (ln Σ e^s)²
};

// ln Σ e^s; in double, because the reference may be large and the loss is what is left of it.
MINITRON_INLINE double kl_log_sum(const KLStatistics& r, float temperature) {
    return kLn2 * r.m * temperature + log(static_cast<double>(r.e));
}

MINITRON_INLINE KLLosses kl_losses(const KLStatistics& r, float temperature) {
    const float ratio = logf(r.a / r.b);
    const float ln2 = static_cast<float>(kLn2);
    const double log_sum = kl_log_sum(r, temperature);
    return {ln2 * (r.c / r.b) + ratio, ln2 * (r.d / r.a) - ratio,
            static_cast<float>(log_sum - r.l), static_cast<float>(log_sum * log_sum)};
}

}  // namespace minitron
