// What the sweeps over rows of logits share; compiled once per instruction set, as vec.h is.

#pragma once

#include <algorithm>

#include "logit_kl_arguments.h"
#include "vec.h"

namespace minitron {
namespace CPU_CAPABILITY {

template <typename T>
const T* row_of(const LogitRows& rows, int64_t row) {
    return static_cast<const T*>(rows.data) + row * rows.stride;
}

template <typename T>
float tile_maximum(const T* row, int64_t count) {
    Vec m0(kNoColumns), m1 = m0, m2 = m0, m3 = m0;
    int64_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
        m0 = fast_max(m0, load(row + i));
        m1 = fast_max(m1, load(row + i + kLanes));
        m2 = fast_max(m2, load(row + i + 2 * kLanes));
        m3 = fast_max(m3, load(row + i + 3 * kLanes));
    }
    for (; i + kLanes <= count; i += kLanes) m0 = fast_max(m0, load(row + i));
    if (i < count) m1 = fast_max(m1, load(row + i, count - i, kNoColumns));
    return reduce_max(fast_max(fast_max(m0, m1), fast_max(m2, m3)));
}

// to[i] = f(s[i], t[i]); `to` may be `s` or `t` itself.
template <typename G, typename S, typename T, typename F>
void map_row(const S* s, const T* t, G* to, int64_t count, const F& f) {
    const bool in_place = static_cast<const void*>(s) == to || static_cast<const void*>(t) == to;
    const bool streaming = !in_place && can_stream(to);
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
        const Vec low = f(load(s + i), load(t + i));
        const Vec high = f(load(s + i + kLanes), load(t + i + kLanes));
        store_pair(to + i, low, high, streaming);
    }
    if (i < count) {
        const int64_t left = count - i, first = std::min(left, kLanes), second = left - first;
        alignas(64) G tail[2 * kLanes];
        store_pair(tail, f(load(s + i, first, 0.f), load(t + i, first, 0.f)),
                   f(load(s + i + first, second, 0.f), load(t + i + first, second, 0.f)), false);
        std::copy(tail, tail + left, to + i);
    }
}

template <typename G>
void zero(G* to, int64_t count) {
    std::fill(to, to + count, static_cast<G>(0.f));
}

}  // namespace CPU_CAPABILITY
}  // namespace minitron
