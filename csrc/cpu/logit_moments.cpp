// The sweep and the gradient of minitron/ops/logit_moments.py, for CPUs.
//
// A tile's sums are taken about its first logits, which keeps large offsets out of them, and are
// moved to its means in fp64, in which tiles are merged.

#include "logit_moments.h"

#include <algorithm>

#include "logit_gradient.h"

namespace minitron {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kTile = 4096;

struct Moments {
    double n = 0, student_mean = 0, teacher_mean = 0, student = 0, teacher = 0, difference = 0;

    void merge(const Moments& other) {
        if (other.n == 0) return;
        const double count = n + other.n, share = other.n / count;
        const double s = other.student_mean - student_mean, t = other.teacher_mean - teacher_mean;
        const double weight = n * share;
        student += other.student + weight * s * s;
        teacher += other.teacher + weight * t * t;
        difference += other.difference + weight * (s - t) * (s - t);
        student_mean += share * s;
        teacher_mean += share * t;
        n = count;
    }
};

// Lanes in which both logits count.
Vec finite(const Vec& s, const Vec& t) { return (s != Vec(-kInfinity)) & (t != Vec(-kInfinity)); }

template <typename T>
float origin(const T* x, int64_t count) {
    const auto counts = [](T value) { return static_cast<float>(value) != -kInfinity; };
    const T* const found = std::find_if(x, x + count, counts);
    return found == x + count ? 0.f : static_cast<float>(*found);
}

template <typename S, typename T>
Moments tile_moments(const S* s, const T* t, int64_t count) {
    const float student_origin = origin(s, count), teacher_origin = origin(t, count);
    Vec n(0.f), x(0.f), y(0.f), xx(0.f), yy(0.f), dd(0.f);
    const auto add = [&](const Vec& student, const Vec& teacher) {
        const Vec counts = finite(student, teacher), none(0.f);
        const Vec a = Vec::blendv(none, student - Vec(student_origin), counts);
        const Vec b = Vec::blendv(none, teacher - Vec(teacher_origin), counts);
        const Vec d = a - b;
        n = n + Vec::blendv(none, Vec(1.f), counts);
        x = x + a;
        y = y + b;
        xx = at::vec::fmadd(a, a, xx);
        yy = at::vec::fmadd(b, b, yy);
        dd = at::vec::fmadd(d, d, dd);
    };
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) add(load(s + i), load(t + i));
    if (i < count) add(load(s + i, count - i, -kInfinity), load(t + i, count - i, -kInfinity));
    Moments r;
    r.n = reduce_add(n);
    if (r.n == 0) return r;
    const double sum_x = reduce_add(x), sum_y = reduce_add(y), sum_d = sum_x - sum_y;
    r.student_mean = student_origin + sum_x / r.n;
    r.teacher_mean = teacher_origin + sum_y / r.n;
    r.student = std::max(0.0, reduce_add(xx) - sum_x * sum_x / r.n);
    r.teacher = std::max(0.0, reduce_add(yy) - sum_y * sum_y / r.n);
    r.difference = std::max(0.0, reduce_add(dd) - sum_d * sum_d / r.n);
    return r;
}

template <typename S, typename T>
void row_moments(const S* s, const T* t, int64_t columns, float* to) {
    Moments r;
    for (int64_t start = 0; start < columns; start += kTile) {
        r.merge(tile_moments(s + start, t + start, std::min(kTile, columns - start)));
    }
    const double moments[] = {r.n,       r.student_mean, r.teacher_mean,
                              r.student, r.teacher,      r.difference};
    std::copy(moments, moments + kNumMoments, to);
}

template <typename S, typename T>
void gradient_row(const S* s, const T* t, S* to, const LogitKLArguments& args,
                  const LogitMomentsGradient& gradient, int64_t row) {
    const LogitMomentsCoefficients& c = gradient.coefficients[row];
    const Vec student_mean(c.student_mean), teacher_mean(c.teacher_mean);
    const Vec by_student(c.by_student), by_teacher(c.by_teacher);
    const float* const merged = args.labels ? gradient.normalizers + row * kNumStatistics : nullptr;
    const float lambda = args.labels ? gradient.out.weights[row] : 0.f;
    const Vec reference(args.labels ? merged[0] : 0.f);
    const Vec gamma(args.labels ? lambda / merged[6] : 0.f);
    const auto f = [&](const Vec& student, const Vec& teacher) {
        const Vec g = at::vec::fmadd(by_student, student - student_mean,
                                     by_teacher * (teacher - teacher_mean));
        const Vec distance = Vec::blendv(Vec(0.f), g, finite(student, teacher));
        if (lambda == 0.f) return distance;
        return at::vec::fmadd(gamma, exp2((student - reference) * Vec(kLog2E)), distance);
    };
    map_row_with_label(s, t, to, args, lambda, row, f);
}

}  // namespace

void logit_moments(const LogitKLArguments& args, int64_t begin, int64_t end, float* moments) {
    by_dtype(args, [&](auto student, auto teacher) {
        for (int64_t row = begin; row < end; ++row) {
            float* const to = moments + row * kNumMoments;
            std::fill(to, to + kNumMoments, 0.f);
            if (args.mask && !args.mask[row]) continue;
            row_moments(row_of<decltype(student)>(args.student, row),
                        row_of<decltype(teacher)>(args.teacher, row), args.columns, to);
        }
    });
}

void logit_moments_gradient(const LogitKLArguments& args, const LogitMomentsGradient& gradient,
                            int64_t begin, int64_t end) {
    by_dtype(args, [&](auto student, auto teacher) {
        using S = decltype(student);
        for (int64_t row = begin; row < end; ++row) {
            S* const to = static_cast<S*>(gradient.out.data) + row * gradient.out.stride;
            if (args.mask && !args.mask[row]) {
                zero(to, args.columns + args.padding);
                continue;
            }
            gradient_row(row_of<S>(args.student, row), row_of<decltype(teacher)>(args.teacher, row),
                         to, args, gradient, row);
        }
    });
    streaming_fence();
}

}  // namespace CPU_CAPABILITY
}  // namespace minitron
