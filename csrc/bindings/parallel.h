// Shares out rows among torch's threads as they become free.

#pragma once

#include <ATen/Parallel.h>

#if !defined(INTRA_OP_PARALLEL)
#error "at::parallel_for runs on one thread here: compile as torch was, with -fopenmp"
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace minitron {

// Calls f(begin, end) over [0, count), for at least `least` at a time. Equal shares, as
// at::parallel_for makes them, wait for the thread whose core has other work too; small ones taken
// in turn do not. Rows do not depend on each other: who computes them changes no digit.
template <typename F>
void share_out(int64_t count, int64_t least, const F& f) {
    constexpr int64_t kSharesPerThread = 32;
    const int64_t threads = at::get_num_threads();
    const int64_t share = std::max(least, count / (threads * kSharesPerThread));
    std::atomic<int64_t> next = 0;
    at::parallel_for(0, std::min(threads, count), 1, [&](int64_t, int64_t) {
        for (int64_t begin; (begin = next.fetch_add(share)) < count;) {
            f(begin, std::min(begin + share, count));
        }
    });
}

// Room for so many values, which the thread keeps between calls: fresh memory of such a size would
// be mapped, and faulted in, again.
template <typename T>
T* scratch_of_thread(int64_t size) {
    thread_local std::vector<T> scratch;
    if (scratch.size() < static_cast<size_t>(size)) scratch.resize(size);
    return scratch.data();
}

}  // namespace minitron
