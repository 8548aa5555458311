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

MINITRON_INLINE KLStatistics kl_merge(const KLStatistics& u, const KLStatistics& v,
                                      float temperature) {
    KLStatistics r;
    r.m = u.m > v.m ? u.m : v.m;
    r.n = u.n > v.n ? u.n : v.n;
    const float um = (u.m - r.m) / temperature, un = (u.n - r.n) / temperature;
    const float vm = (v.m - r.m) / temperature, vn = (v.n - r.n) / temperature;
    const float u_student = kl_weight(um), v_student = kl_weight(vm);
    const float u_teacher = kl_weight(un), v_teacher = kl_weight(vn);
    r.a = u.a * u_student + v.a * v_student;
    r.b = u.b * u_teacher + v.b * v_teacher;
    r.c = kl_moved(u.c, u.b, u_teacher, un, um) + kl_moved(v.c, v.b, v_teacher, vn, vm);
    r.d = kl_moved(u.d, u.a, u_student, um, un) + kl_moved(v.d, v.a, v_student, vm, vn);
    r.e = u.e * kl_weight(u.m - r.m) + v.e * kl_weight(v.m - r.m);
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

MINITRON_INLINE KLLosses kl_losses(const KLStatistics& r) {
    const float ratio = logf(r.a / r.b), log_e = logf(r.e), log_sum = r.m + log_e;
    return {r.c / r.b + ratio, r.d / r.a - ratio, (r.m - r.l) + log_e, log_sum * log_sum};
}

}  // namespace minitron
