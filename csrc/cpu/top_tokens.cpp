// The choice of minitron/ops/top_tokens.py, for CPUs.
//
// A row is cut into several times as many groups of columns as tokens are wanted. The k-th largest
// of the groups' maxima cannot be above the k-th largest logit, and is not far below it: a second
// read of the row, which is in a cache by then, takes what reaches that bound, a few more than k.
// The k-th largest of a set is found by bisection over the bits of a float, counting whole vectors.

#include "top_tokens.h"

#include <algorithm>
#include <bit>

#include "logit_rows.h"

namespace minitron {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kTile = 8192;         // columns summed up in fp32
constexpr int64_t kGroupsPerToken = 4;  // more cost time to count, fewer let more logits pass

// Floats in order as integers in order, and back.
int64_t rank_of(float x) {
    const int32_t bits = std::bit_cast<int32_t>(x);
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}

float of_rank(int64_t rank) {
    const int32_t bits = static_cast<int32_t>(rank);
    return std::bit_cast<float>(bits < 0 ? bits ^ 0x7fffffff : bits);
}

// The largest bound that k of these values are not below; it is −inf if there are no more than k.
// Values come in whole vectors.
float bound_of_largest(const float* values, int64_t count, int64_t k) {
    int64_t low = rank_of(-kInfinity), high = rank_of(kInfinity) + 1;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        const Vec bound(of_rank(middle));
        int64_t reached = 0;
        for (int64_t i = 0; i < count; i += kLanes) {
            reached += std::popcount(not_below(load(values + i), bound));
        }
        if (reached == k) return of_rank(middle);
        (reached > k ? low : high) = middle;
    }
    return of_rank(low);
}

template <typename T>
Vec load_some(const T* from, int64_t count) {
    return count < kLanes ? load(from, count, -kInfinity) : load(from);
}

// Maxima of groups of columns, in whole vectors, and how many there are.
template <typename T>
int64_t group_maxima(const T* row, int64_t columns, int64_t wanted, float* maxima) {
    const int64_t width = std::max<int64_t>(1, columns / (kGroupsPerToken * wanted)) * kLanes;
    int64_t groups = 0;
    for (int64_t start = 0; start < columns; start += width, groups += kLanes) {
        const int64_t end = std::min(start + width, columns);
        Vec m(-kInfinity);
        for (int64_t i = start; i < end; i += kLanes) {
            m = fast_max(load_some(row + i, end - i), m);  // past NaN
        }
        m.store(maxima + groups);
    }
    return groups;
}

float maximum_of(const float* values, int64_t count) {
    Vec m(kNoColumns);
    for (int64_t i = 0; i < count; i += kLanes) m = fast_max(m, load(values + i));
    return reduce_max(m);
}

// The `wanted` largest in ascending order of columns, of equal ones the first, from those found,
// and what their values and ids are written to.
void keep_largest(const float* values, const float* ids, int64_t found, int64_t wanted,
                  float* to_values, float* to_ids) {
    const float bound = bound_of_largest(values, (found + kLanes - 1) / kLanes * kLanes, wanted);
    const auto is_above = [&](float value) { return !(value <= bound); };  // NaN is
    int64_t equal = wanted - std::count_if(values, values + found, is_above);
    for (int64_t i = 0, kept = 0; i < found && kept < wanted; ++i) {
        if (!is_above(values[i]) && !(values[i] == bound && equal-- > 0)) continue;
        to_values[kept] = values[i];
        to_ids[kept++] = ids[i];
    }
}

template <typename T>
void row_candidates(const T* row, const TopTokensArguments& args, float* out, float* scratch) {
    float* const values = scratch;
    float* const ids = scratch + args.columns + 16;
    const int64_t wanted = std::min(args.slots, args.columns);
    const int64_t groups = group_maxima(row, args.columns, wanted, values);
    const float maximum = maximum_of(values, groups);
    const float bound = bound_of_largest(values, groups, wanted);

    const Vec reference(maximum), scale(kLog2E / args.temperature), least(bound);
    double total = 0;
    int64_t found = 0;
    for (int64_t start = 0; start < args.columns; start += kTile) {
        const int64_t end = std::min(start + kTile, args.columns);
        Vec sum(0.f);
        for (int64_t i = start; i < end; i += kLanes) {
            const Vec logits = load_some(row + i, end - i);
            sum = sum + exp2((logits - reference) * scale);
            for (unsigned lanes = not_below(logits, least); lanes; lanes &= lanes - 1) {
                const int64_t column = i + std::countr_zero(lanes);
                if (column == end) break;  // what follows is no column
                values[found] = static_cast<float>(row[column]);
                ids[found++] = static_cast<float>(column + args.first_id);
            }
        }
        total += reduce_add(sum);
    }
    std::fill_n(values + found, kLanes, -kInfinity);
    out[0] = maximum;
    out[1] = static_cast<float>(total);
    keep_largest(values, ids, found, wanted, out + 2, out + 2 + args.slots);
}

}  // namespace

void top_candidates(const TopTokensArguments& args, int64_t begin, int64_t end, float* out,
                    float* scratch) {
    const int64_t width = 2 + 2 * args.slots;
    for (int64_t row = begin; row < end; ++row) {
        float* const to = out + row * width;
        to[0] = kNoColumns;
        to[1] = 0.f;
        std::fill_n(to + 2, args.slots, -kInfinity);
        std::fill_n(to + 2 + args.slots, args.slots, -1.f);
        if (args.columns == 0 || (args.mask && !args.mask[row])) continue;
        if (args.rows.dtype == Dtype::kFloat32) {
            row_candidates(row_of<float>(args.rows, row), args, to, scratch);
        } else {
            row_candidates(row_of<BFloat16>(args.rows, row), args, to, scratch);
        }
    }
}

}  // namespace CPU_CAPABILITY
}  // namespace minitron
