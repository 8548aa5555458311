// The sweeps of minitron/ops/sparse_kl.py, for CPUs.
//
// A word for every vector of logits says which of its lanes hold a known token, so that one sweep
// tells the sums of those from the sums of all others. As in cross_entropy.cpp, the first tile of a
// row is read twice, for its maximum and for its sums, and those that follow take that maximum as
// their reference, unless their sums then get large.
//
// The gradient is first written as if no token were known; what known tokens get is computed
// before, since the logits may be overwritten, and written after.

#include "sparse_kl.h"

#include <algorithm>
#include <type_traits>

#include "logit_rows.h"

namespace minitron {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kTile = 8192;  // columns that fit a first-level cache
static_assert(kTile % kLanes == 0 && kLanes <= 8 * static_cast<int64_t>(sizeof(KnownLanes)));

struct Statistics {
    float m, off, on, cross, known, unit, label;
};
static_assert(sizeof(Statistics) == kNumSparseKLStatistics * sizeof(float));

struct Sums {
    float off, on, unit;
};

// The column of the row's i-th known token, −1 if it has none here.
int64_t known_column(const SparseKLArguments& args, int64_t row, int64_t i) {
    const int64_t id = args.ids[row * args.known + i], column = id - args.label_offset;
    return id >= 0 && column >= 0 && column < args.columns ? column : -1;
}

int64_t label_column(const SparseKLArguments& args, int64_t row) {
    const int64_t column = args.labels ? args.labels[row] - args.label_offset : -1;
    return column < args.columns ? column : -1;
}

// Calls f(i, weights, logits) for a vector of known tokens at a time, from the i-th on. Those that
// are not here weigh nothing.
template <typename T, typename F>
void for_each_known(const T* s, const SparseKLArguments& args, int64_t row, const F& f) {
    for (int64_t i = 0; i < args.known; i += kLanes) {
        alignas(64) float weights[kLanes] = {}, logits[kLanes] = {};
        for (int64_t k = i; k < std::min(i + kLanes, args.known); ++k) {
            const int64_t column = known_column(args, row, k);
            if (column < 0) continue;
            weights[k - i] = args.weights[row * args.known + k];
            logits[k - i] = static_cast<float>(s[column]);
        }
        f(i, load(weights), load(logits));
    }
}

template <bool kUnitSum, typename T>
Sums tile_sums(const T* s, const KnownLanes* known, int64_t count, float m, float temperature) {
    const Vec reference(m), scale(kLog2E / temperature);
    Vec off(0.f), on(0.f), unit(0.f);
    const auto add = [&](const Vec& logits, unsigned lanes) {
        const Vec x = logits - reference, e = exp2(x * scale);
        off = add_lanes(~lanes, e, off);
        on = add_lanes(lanes, e, on);
        if constexpr (kUnitSum) unit = unit + exp2(x * Vec(kLog2E));
    };
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) add(load(s + i), *known++);
    if (i < count) add(load(s + i, count - i, -kInfinity), *known);
    return {reduce_add(off), reduce_add(on), reduce_add(unit)};
}

template <bool kUnitSum, typename T>
Statistics row_statistics(const T* s, const SparseKLArguments& args, int64_t row,
                          const KnownLanes* known) {
    constexpr float kLarge = 0x1p60f;
    const float temperature = args.temperature;
    Statistics r = {kNoColumns, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
    for (int64_t start = 0; start < args.columns; start += kTile) {
        const int64_t count = std::min(kTile, args.columns - start);
        const auto run = [&](float m) {
            return tile_sums<kUnitSum>(s + start, known + start / kLanes, count, m, temperature);
        };
        if (r.off + r.on > 0.f) {
            const Sums tile = run(r.m);
            if (tile.off + tile.on < kLarge && tile.unit < kLarge) {
                r.off += tile.off;
                r.on += tile.on;
                r.unit += tile.unit;
                continue;
            }
        }
        const float m = tile_maximum(s + start, count), top = std::max(r.m, m);
        const Sums tile = run(m);
        const float before = kl_weight((r.m - top) / temperature);
        const float now = kl_weight((m - top) / temperature);
        r.off = r.off * before + tile.off * now;
        r.on = r.on * before + tile.on * now;
        r.unit = r.unit * kl_weight(r.m - top) + tile.unit * kl_weight(m - top);
        r.m = top;
    }
    Vec cross(0.f), weight(0.f);
    for_each_known(s, args, row, [&](int64_t, const Vec& weights, const Vec& logits) {
        const Vec x = (logits - Vec(r.m)) / Vec(temperature);
        cross = add_product_where_positive(weights, weights.log() - x, cross);
        weight = weight + weights;
    });
    r.cross = reduce_add(cross);
    r.known = reduce_add(weight);
    if (args.labels && !kUnitSum) r.unit = r.off + r.on;
    const int64_t label = label_column(args, row);
    if (label >= 0) r.label = static_cast<float>(s[label]);
    return r;
}

template <bool kUnitSum, typename T>
void gradient_row(const T* s, T* to, const SparseKLArguments& args, const LogitKLGradient& out,
                  const SparseKLMerged& r, int64_t row, float* known_slopes) {
    const float weight = out.weights[row] / args.temperature;
    const float lambda = args.labels ? out.weights[out.tokens + row] : 0.f;
    const float gamma = args.labels ? lambda / r.unit : 0.f;
    const float share = r.mass / r.total, tail = r.off > 0.f ? r.rest / r.off : 0.f;
    const Vec reference(r.m), scale(kLog2E / args.temperature);
    const auto slope = [&](const Vec& logits, float alpha, const Vec& constant) {
        const Vec x = logits - reference, factor(kUnitSum ? alpha : alpha + gamma);
        const Vec by_kl = at::vec::fmadd(factor, exp2(x * scale), constant);
        return kUnitSum ? at::vec::fmadd(Vec(gamma), exp2(x * Vec(kLog2E)), by_kl) : by_kl;
    };
    const auto unknown = [&](const Vec& logits) {
        return slope(logits, weight * (share - tail), Vec(0.f));
    };
    for_each_known(s, args, row, [&](int64_t i, const Vec& weights, const Vec& logits) {
        slope(logits, weight * share, Vec(-weight) * weights).store(known_slopes + i);
    });
    const int64_t label = label_column(args, row);
    alignas(64) float at_label[kLanes];
    if (label >= 0) unknown(Vec(static_cast<float>(s[label]))).store(at_label);

    map_row(s, s, to, args.columns, [&](const Vec& logits, const Vec&) { return unknown(logits); });
    if (label >= 0) to[label] = static_cast<T>(at_label[0] - lambda);
    for (int64_t i = 0; i < args.known; ++i) {
        const int64_t column = known_column(args, row, i);
        if (column < 0) continue;
        to[column] = static_cast<T>(known_slopes[i] - (column == label ? lambda : 0.f));
    }
    zero(to + args.columns, args.padding);
}

// Calls f(kUnitSum, T()) for what the arguments ask; at τ = 1 the sum of the divergence is that of
// the cross-entropy.
template <typename F>
void specialise(const SparseKLArguments& args, const F& f) {
    const auto by_type = [&](auto unit_sum) {
        args.student.dtype == Dtype::kFloat32 ? f(unit_sum, float()) : f(unit_sum, BFloat16());
    };
    args.labels&& args.temperature != 1.f ? by_type(std::true_type()) : by_type(std::false_type());
}

}  // namespace

void sparse_kl_statistics(const SparseKLArguments& args, int64_t begin, int64_t end,
                          float* statistics, KnownLanes* scratch) {
    auto* const out = reinterpret_cast<Statistics*>(statistics);
    std::fill_n(scratch, sparse_kl_vectors(args.columns), KnownLanes(0));
    specialise(args, [&](auto unit_sum, auto type) {
        for (int64_t row = begin; row < end; ++row) {
            if (args.mask && !args.mask[row]) {
                out[row] = {kNoColumns, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
                continue;
            }
            const auto for_each_column = [&](const auto& g) {
                for (int64_t i = 0; i < args.known; ++i) {
                    const int64_t column = known_column(args, row, i);
                    if (column >= 0) g(scratch[column / kLanes], column % kLanes);
                }
            };
            for_each_column([](KnownLanes& lanes, int64_t lane) { lanes |= 1u << lane; });
            out[row] = row_statistics<unit_sum>(row_of<decltype(type)>(args.student, row), args,
                                                row, scratch);
            for_each_column([](KnownLanes& lanes, int64_t) { lanes = 0; });
        }
    });
}

void sparse_kl_gradient(const SparseKLArguments& args, const LogitKLGradient& gradient,
                        const float* merged, int64_t begin, int64_t end, float* scratch) {
    const auto* const by_row = reinterpret_cast<const SparseKLMerged*>(merged);
    specialise(args, [&](auto unit_sum, auto type) {
        using T = decltype(type);
        for (int64_t row = begin; row < end; ++row) {
            T* const to = static_cast<T*>(gradient.data) + row * gradient.stride;
            if (args.mask && !args.mask[row]) {
                zero(to, args.columns + args.padding);
                continue;
            }
            gradient_row<unit_sum>(row_of<T>(args.student, row), to, args, gradient, by_row[row],
                                   row, scratch);
        }
    });
    streaming_fence();
}

}  // namespace CPU_CAPABILITY
}  // namespace minitron
