// The sweeps over logits of csrc/include/kl_merge.h, for CPUs.
//
// A row is cut into tiles. The first is read twice, for its maxima and for its sums; those that
// follow take its maxima as their references. Where that was too bold, because a tile's sums got
// large or are not finite, the tile is done again from its own maxima and with every guard.
//
// The fused kernel takes a row's gradient while its logits are in the second-level cache, so that
// each is read from memory once. For bf16 it keeps the exponentials there: the gradient is then a
// multiplication and a subtraction. In fp32 that costs more traffic than it saves arithmetic.

#include "logit_kl.h"

#include <algorithm>
#include <type_traits>

#include "logit_rows.h"

namespace minitron {
namespace CPU_CAPABILITY {
namespace {

// Statistics of a tile with references m and n; kKeep also stores the exponentials. Guarded, it
// knows that nothing times infinity is nothing.
template <bool kReverse, bool kUnitSum, bool kKeep, bool kGuarded, typename S, typename T>
KLStatistics tile_statistics(const S* s, const T* t, int64_t count, float temperature, float m,
                             float n, float* student_exp, float* teacher_exp) {
    const Vec scale(kLog2E / temperature), student_reference(m), teacher_reference(n);
    Vec a(0.f), b(0.f), c(0.f), d(0.f), e(0.f);
    const auto add_product = [](const Vec& weight, const Vec& x, const Vec& sum) {
        return kGuarded ? add_product_where_positive(weight, x, sum)
                        : at::vec::fmadd(weight, x, sum);
    };
    const auto add = [&](const Vec& student, const Vec& teacher, int64_t i) {
        const Vec x = student - student_reference, y = teacher - teacher_reference;
        const Vec p = exp2(x * scale), q = exp2(y * scale);
        a = a + p;
        b = b + q;
        c = add_product(q, y - x, c);
        if constexpr (kReverse) d = add_product(p, x - y, d);
        if constexpr (kUnitSum) e = e + exp2(x * Vec(kLog2E));
        if constexpr (kKeep) {
            p.store(student_exp + i);
            q.store(teacher_exp + i);
        }
    };
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) add(load(s + i), load(t + i), i);
    if (i < count) {  // low enough to count nothing, yet finite
        add(load(s + i, count - i, kNoColumns), load(t + i, count - i, kNoColumns), i);
    }
    KLStatistics r = {m, n, reduce_add(a), reduce_add(b), 0.f, 0.f, 0.f, 0.f};
    r.c = reduce_add(c) / temperature;
    r.d = reduce_add(d) / temperature;
    r.e = kUnitSum ? reduce_add(e) : r.a;
    return r;
}

// Whether sums taken from foreign references have all their digits and room to be added up.
bool sound(const KLStatistics& r) {
    constexpr float kLarge = 0x1p60f;
    return r.a < kLarge && r.b < kLarge && r.e < kLarge && std::abs(r.c) < kLarge &&
           std::abs(r.d) < kLarge;
}

// Statistics of a row. With kKeep, `student_exp` and `teacher_exp` hold its exponentials and
// `references` those that they have, two a tile.
template <bool kReverse, bool kUnitSum, bool kKeep, typename S, typename T>
KLStatistics row_statistics(const S* s, const T* t, const LogitKLArguments& args, int64_t row,
                            float* student_exp = nullptr, float* teacher_exp = nullptr,
                            float* references = nullptr) {
    KLStatistics r = kl_neutral();
    for (int64_t start = 0; start < args.columns; start += kTile) {
        const int64_t count = std::min(kTile, args.columns - start);
        const auto run = [&](auto guarded, float m, float n) {
            return tile_statistics<kReverse, kUnitSum, kKeep, guarded>(
                s + start, t + start, count, args.temperature, m, n, student_exp + start,
                teacher_exp + start);
        };
        KLStatistics tile = kl_neutral();
        if (r.a > 0.f && r.b > 0.f) tile = run(std::false_type(), r.m, r.n);
        if (tile.m == kNoColumns || !sound(tile)) {
            tile = run(std::true_type(), tile_maximum(s + start, count),
                       tile_maximum(t + start, count));
        }
        if constexpr (kKeep) {
            *references++ = tile.m;
            *references++ = tile.n;
        }
        r = kl_merge(r, tile, args.temperature);
    }
    if (args.labels) {
        const int64_t column = args.labels[row] - args.label_offset;
        if (column >= 0 && column < args.columns) r.l = static_cast<float>(s[column]);
    }
    return r;
}

// What the gradient by the student's logits needs of a row: with p and q the probabilities at τ
// and p₁ the student's at τ = 1, it is
//
//     α p − β q + ρ p (ln p − ln q − KL(p ‖ q)) + γ p₁ − λ [column is the label]
//
// Here the normalisers are part of α, β, ρ and γ, which multiply bare exponentials.
struct RowGradient {
    float m, n, scale;
    float alpha, beta, rho, gamma, lambda, centre;

    RowGradient(const KLStatistics& r, const LogitKLArguments& args, const LogitKLGradient& out,
                int64_t row)
        : m(r.m), n(r.n), scale(kLog2E / args.temperature) {
        const float* weights = out.weights + row;
        const float z_slope = 2 * (r.m + std::log(r.e)) * weights[3 * out.tokens];
        lambda = weights[2 * out.tokens];
        gamma = (lambda + z_slope) / r.e;
        alpha = weights[0] / args.temperature / r.a;
        beta = weights[0] / args.temperature / r.b;
        rho = weights[out.tokens] / args.temperature / args.temperature / r.a;
        centre = r.d / r.a * args.temperature;  // mean of x − y under p: the normalisers cancel
        if (args.temperature == 1.f) {
            alpha += gamma;
            gamma = 0.f;
        }
    }

    template <bool kReverse, bool kUnitSum>
    Vec operator()(const Vec& student, const Vec& teacher) const {
        const Vec x = student - Vec(m), y = teacher - Vec(n);
        const Vec p = exp2(x * Vec(scale)), q = exp2(y * Vec(scale));
        Vec g = at::vec::fmsub(Vec(alpha), p, Vec(beta) * q);
        if constexpr (kReverse) {
            g = add_product_where_positive(p, Vec(rho) * (x - y - Vec(centre)), g);
        }
        if constexpr (kUnitSum) {
            g = at::vec::fmadd(Vec(gamma), exp2(x * Vec(kLog2E)), g);
        }
        return g;
    }
};

float first(const Vec& x) {
    float lanes[kLanes];
    x.store(lanes);
    return lanes[0];
}

int64_t label_column(const LogitKLArguments& args, const RowGradient& gradient, int64_t row) {
    if (!args.labels || gradient.lambda == 0.f) return -1;
    const int64_t column = args.labels[row] - args.label_offset;
    return column < args.columns ? column : -1;
}

template <bool kReverse, bool kUnitSum, typename S, typename T>
void gradient_row(const S* s, const T* t, S* to, const KLStatistics& r,
                  const LogitKLArguments& args, const LogitKLGradient& out, int64_t row) {
    if constexpr (kReverse) {  // an infinite divergence that nobody weighs must not matter
        if (out.weights[out.tokens + row] == 0.f) {
            gradient_row<false, kUnitSum>(s, t, to, r, args, out, row);
            return;
        }
    }
    const RowGradient gradient(r, args, out, row);
    const auto f = [&](const Vec& x, const Vec& y) {
        return gradient.template operator()<kReverse, kUnitSum>(x, y);
    };
    const int64_t column = label_column(args, gradient, row);
    float at_label = 0.f;  // before the logits may be overwritten
    if (column >= 0) {
        at_label = first(f(Vec(static_cast<float>(s[column])), Vec(static_cast<float>(t[column]))));
    }
    map_row(s, t, to, args.columns, f);
    if (column >= 0) to[column] = static_cast<S>(at_label - gradient.lambda);
    zero(to + args.columns, args.padding);
}

template <bool kReverse, bool kUnitSum, typename S, typename T>
void fused_row(const S* s, const T* t, S* to, KLStatistics& r, const LogitKLArguments& args,
               const LogitKLGradient& out, float* scratch, int64_t row) {
    if constexpr (kReverse || kUnitSum || std::is_same_v<S, float>) {
        r = row_statistics<kReverse, kUnitSum, false>(s, t, args, row);
        gradient_row<kReverse, kUnitSum>(s, t, to, r, args, out, row);
        return;
    }
    const int64_t stride = (args.columns + kLanes - 1) / kLanes * kLanes;
    float* const student_exp = scratch;
    float* const teacher_exp = scratch + stride;
    float* const references = scratch + 2 * stride;
    r = row_statistics<kReverse, kUnitSum, true>(s, t, args, row, student_exp, teacher_exp,
                                                 references);
    const RowGradient gradient(r, args, out, row);
    const int64_t column = label_column(args, gradient, row);
    for (int64_t start = 0, tile = 0; start < args.columns; start += kTile, ++tile) {
        const int64_t count = std::min(kTile, args.columns - start);
        const Vec alpha(gradient.alpha *
                        kl_weight((references[2 * tile] - r.m) / args.temperature));
        const Vec beta(gradient.beta *
                       kl_weight((references[2 * tile + 1] - r.n) / args.temperature));
        const auto f = [&](const Vec& p, const Vec& q) {
            return at::vec::fmsub(alpha, p, beta * q);
        };
        map_row(student_exp + start, teacher_exp + start, to + start, count, f);
        if (column >= start && column < start + count) {
            const float at_label = first(f(Vec(student_exp[column]), Vec(teacher_exp[column])));
            to[column] = static_cast<S>(at_label - gradient.lambda);
        }
    }
    zero(to + args.columns, args.padding);
}

// Calls f(kReverse, kUnitSum, S(), T()) for what the arguments ask.
template <typename F>
void specialise(const LogitKLArguments& args, const F& f) {
    const auto flag = [](bool value, const auto& next) {
        value ? next(std::true_type()) : next(std::false_type());
    };
    const auto type = [](const LogitRows& rows, const auto& next) {
        rows.dtype == Dtype::kFloat32 ? next(float()) : next(BFloat16());
    };
    flag(args.reverse, [&](auto reverse) {
        flag(args.unit_sum, [&](auto unit_sum) {
            type(args.student,
                 [&](auto s) { type(args.teacher, [&](auto t) { f(reverse, unit_sum, s, t); }); });
        });
    });
}

}  // namespace

void logit_kl_statistics(const LogitKLArguments& args, int64_t begin, int64_t end,
                         float* statistics) {
    auto* const out = reinterpret_cast<KLStatistics*>(statistics);
    specialise(args, [&](auto reverse, auto unit_sum, auto student, auto teacher) {
        for (int64_t row = begin; row < end; ++row) {
            if (args.mask && !args.mask[row]) {
                out[row] = kl_neutral();
                continue;
            }
            out[row] = row_statistics<reverse, unit_sum, false>(
                row_of<decltype(student)>(args.student, row),
                row_of<decltype(teacher)>(args.teacher, row), args, row);
        }
    });
}

void logit_kl_gradient(const LogitKLArguments& args, const LogitKLGradient& gradient,
                       const float* statistics, int64_t begin, int64_t end) {
    const auto* const merged = reinterpret_cast<const KLStatistics*>(statistics);
    specialise(args, [&](auto reverse, auto unit_sum, auto student, auto teacher) {
        using S = decltype(student);
        for (int64_t row = begin; row < end; ++row) {
            S* const to = static_cast<S*>(gradient.data) + row * gradient.stride;
            if (args.mask && !args.mask[row]) {
                zero(to, args.columns + args.padding);
                continue;
            }
            gradient_row<reverse, unit_sum>(row_of<S>(args.student, row),
                                            row_of<decltype(teacher)>(args.teacher, row), to,
                                            merged[row], args, gradient, row);
        }
    });
    streaming_fence();
}

void logit_kl_fused(const LogitKLArguments& args, const LogitKLGradient& gradient,
                    float* statistics, float* scratch, int64_t begin, int64_t end) {
    auto* const out = reinterpret_cast<KLStatistics*>(statistics);
    specialise(args, [&](auto reverse, auto unit_sum, auto student, auto teacher) {
        using S = decltype(student);
        for (int64_t row = begin; row < end; ++row) {
            S* const to = static_cast<S*>(gradient.data) + row * gradient.stride;
            if (args.mask && !args.mask[row]) {
                out[row] = kl_neutral();
                zero(to, args.columns + args.padding);
                continue;
            }
            fused_row<reverse, unit_sum>(row_of<S>(args.student, row),
                                         row_of<decltype(teacher)>(args.teacher, row), to, out[row],
                                         args, gradient, scratch, row);
        }
    });
    streaming_fence();
}

}  // namespace CPU_CAPABILITY
}  // namespace minitron
