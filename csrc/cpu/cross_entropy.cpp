// The sweeps of minitron/ops/cross_entropy.py, for CPUs.
//
// As in logit_kl.cpp, the first tile of a row is read twice, for its maximum and for its sum, and
// those that follow take that maximum as their reference, unless their sums then get large.

#include "cross_entropy.h"

#include <algorithm>
#include <cmath>

#include "logit_rows.h"

namespace minitron {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kTile = 8192;  // columns that fit a first-level cache

struct Statistics {
    float m, a, l;  // reference, Σ e^(s−m), s[label]
};
static_assert(sizeof(Statistics) == kNumCrossEntropyStatistics * sizeof(float));

template <typename T>
float tile_sum(const T* row, int64_t count, float m) {
    const Vec reference(m), scale(kLog2E);
    const auto power = [&](const Vec& x) { return exp2((x - reference) * scale); };
    Vec a0(0.f), a1(0.f);
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
        a0 = a0 + power(load(row + i));
        a1 = a1 + power(load(row + i + kLanes));
    }
    for (; i < count; i += kLanes) {
        a0 = a0 + power(load(row + i, std::min(kLanes, count - i), kNoColumns));
    }
    return reduce_add(a0 + a1);
}

// The label's column if it is among those here, −1 otherwise.
int64_t label_column(const CrossEntropyArguments& args, int64_t row) {
    const int64_t column = args.labels[row] - args.label_offset;
    return column >= 0 && column < args.columns ? column : -1;
}

template <typename T>
Statistics row_statistics(const T* row, const CrossEntropyArguments& args, int64_t label) {
    constexpr float kLarge = 0x1p60f;
    Statistics r = {kNoColumns, 0.f, label >= 0 ? static_cast<float>(row[label]) : 0.f};
    for (int64_t start = 0; start < args.columns; start += kTile) {
        const int64_t count = std::min(kTile, args.columns - start);
        if (r.a > 0.f) {
            const float a = tile_sum(row + start, count, r.m);
            if (a < kLarge) {
                r.a += a;
                continue;
            }
        }
        const float m = tile_maximum(row + start, count), top = std::max(r.m, m);
        r.a = r.a * kl_weight(r.m - top) + tile_sum(row + start, count, m) * kl_weight(m - top);
        r.m = top;
    }
    return r;
}

template <typename T>
void gradient_row(const T* row, T* to, const CrossEntropyArguments& args, const Statistics& r,
                  float weight, int64_t label) {
    const Vec reference(r.m), scale(kLog2E), factor(weight / r.a);
    map_row(row, row, to, args.columns,
            [&](const Vec& x, const Vec&) { return exp2((x - reference) * scale) * factor; });
    if (label >= 0) {
        const float p = std::exp(static_cast<float>(row[label]) - r.m) / r.a;
        to[label] = static_cast<T>((p - 1.f) * weight);
    }
    zero(to + args.columns, args.padding);
}

template <typename F>
void by_type(const CrossEntropyArguments& args, const F& f) {
    args.logits.dtype == Dtype::kFloat32 ? f(float()) : f(BFloat16());
}

}  // namespace

void cross_entropy_statistics(const CrossEntropyArguments& args, int64_t begin, int64_t end,
                              float* statistics) {
    auto* const out = reinterpret_cast<Statistics*>(statistics);
    by_type(args, [&](auto type) {
        for (int64_t row = begin; row < end; ++row) {
            out[row] = row_statistics(row_of<decltype(type)>(args.logits, row), args,
                                      label_column(args, row));
        }
    });
}

void cross_entropy_gradient(const CrossEntropyArguments& args, const float* statistics,
                            const float* weights, void* gradient, int64_t begin, int64_t end) {
    const auto* const merged = reinterpret_cast<const Statistics*>(statistics);
    const int64_t width = args.columns + args.padding;
    by_type(args, [&](auto type) {
        using T = decltype(type);
        for (int64_t row = begin; row < end; ++row) {
            T* const to = static_cast<T*>(gradient) + row * width;
            if (weights[row] == 0.f) {
                zero(to, width);
                continue;
            }
            gradient_row(row_of<T>(args.logits, row), to, args, merged[row], weights[row],
                         label_column(args, row));
        }
    });
    streaming_fence();
}

}  // namespace CPU_CAPABILITY
}  // namespace minitron
