// The cosine between two rows, in one read of both.

#include <algorithm>
#include <cmath>

#include "activations.h"
#include "vec.h"

namespace minitron {
namespace CPU_CAPABILITY {
namespace {

template <typename T>
float cosine(const T* before, const T* after, int64_t count) {
    Vec dot0(0.f), before0(0.f), after0(0.f), dot1(0.f), before1(0.f), after1(0.f);
    const auto add = [](const Vec& x, const Vec& y, Vec& dot, Vec& xx, Vec& yy) {
        dot = at::vec::fmadd(x, y, dot);
        xx = at::vec::fmadd(x, x, xx);
        yy = at::vec::fmadd(y, y, yy);
    };
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
        add(load(before + i), load(after + i), dot0, before0, after0);
        add(load(before + i + kLanes), load(after + i + kLanes), dot1, before1, after1);
    }
    for (; i < count; i += kLanes) {
        const int64_t left = std::min(kLanes, count - i);
        add(load(before + i, left, 0.f), load(after + i, left, 0.f), dot0, before0, after0);
    }
    const float before_norm = std::sqrt(reduce_add(before0 + before1));
    const float after_norm = std::sqrt(reduce_add(after0 + after1));
    return reduce_add(dot0 + dot1) /
           (std::max(before_norm, kSmallestNorm) * std::max(after_norm, kSmallestNorm));
}

template <typename T>
void rows(const Activations& before, const void* after, int64_t begin, int64_t end, float* out) {
    for (int64_t row = begin; row < end; ++row) {
        const int64_t start = row * before.columns;
        out[row] = cosine(static_cast<const T*>(before.data) + start,
                          static_cast<const T*>(after) + start, before.columns);
    }
}

}  // namespace

void block_cosine(const Activations& before, const void* after, int64_t begin, int64_t end,
                  float* out) {
    before.bfloat16 ? rows<BFloat16>(before, after, begin, end, out)
                    : rows<float>(before, after, begin, end, out);
}

}  // namespace CPU_CAPABILITY
}  // namespace minitron
