// Sums over the rows of an activation, for every column, in one read.
//
// Four rows at a time, a page of each, are added to sums that stay in the first-level cache, so
// that a sum is loaded and stored once for four values. They are fp32 over 256 rows and fp64
// beyond. The hardware does not foresee where the next four rows lie: they are fetched by hand.

#include <algorithm>
#include <cmath>

#include "activations.h"
#include "vec.h"

namespace minitron {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kRowsAtOnce = 4;
constexpr int64_t kRowsInSingle = 256;
template <typename T>
constexpr int64_t kColumnsAtOnce = 4096 / sizeof(T);

template <typename T>
struct Sums {
    alignas(64) float absolute[kColumnsAtOnce<T>];
    alignas(64) float square[kColumnsAtOnce<T>];
    alignas(64) float plain[kColumnsAtOnce<T>];
    alignas(64) float maximum[kColumnsAtOnce<T>];

    void clear(int64_t columns) {
        for (float* const of : {absolute, square, plain, maximum}) {
            std::fill_n(of, columns, 0.f);
        }
    }
};

template <typename T, typename Load>
void add_rows(int64_t rows, const T* x, int64_t stride, int64_t at, Sums<T>& sums,
              const Load& load_at) {
    Vec absolute = load(sums.absolute + at), square = load(sums.square + at);
    Vec plain = load(sums.plain + at), maximum = load(sums.maximum + at);
    for (int64_t row = 0; row < rows; ++row) {
        prefetch(x + (row + kRowsAtOnce) * stride + at);
        const Vec value = load_at(x + row * stride + at);
        const Vec magnitude = value.abs();
        absolute = absolute + magnitude;
        square = at::vec::fmadd(value, value, square);
        plain = plain + value;
        maximum = fast_max(magnitude, maximum);  // past NaN, which the other sums show
    }
    absolute.store(sums.absolute + at);
    square.store(sums.square + at);
    plain.store(sums.plain + at);
    maximum.store(sums.maximum + at);
}

template <typename T>
void add_block(int64_t rows, const T* x, int64_t stride, int64_t columns, Sums<T>& sums) {
    int64_t at = 0;
    const auto whole = [](const T* from) { return load(from); };
    for (; at + kLanes <= columns; at += kLanes) {
        if (rows == kRowsAtOnce) {
            add_rows(kRowsAtOnce, x, stride, at, sums, whole);  // unrolled
        } else {
            add_rows(rows, x, stride, at, sums, whole);
        }
    }
    if (at < columns) {
        const int64_t left = columns - at;
        add_rows(rows, x, stride, at, sums, [&](const T* from) { return load(from, left, 0.f); });
    }
}

template <typename T>
void column_stats(const Activations& x, int64_t begin, int64_t end, double* out) {
    Sums<T> sums;
    const int64_t last = std::min(end * kColumnBlock, x.columns);
    for (int64_t start = begin * kColumnBlock; start < last; start += kColumnsAtOnce<T>) {
        const int64_t columns = std::min(kColumnsAtOnce<T>, last - start);
        double* const to = out + start;
        for (int k = 0; k < kNumActivationStats; ++k) {
            std::fill_n(to + k * x.columns, columns, 0.);
        }
        for (int64_t row = 0; row < x.rows; row += kRowsInSingle) {
            sums.clear(columns);
            const int64_t stop = std::min(row + kRowsInSingle, x.rows);
            for (int64_t r = row; r < stop; r += kRowsAtOnce) {
                add_block(std::min(kRowsAtOnce, stop - r),
                          static_cast<const T*>(x.data) + r * x.columns + start, x.columns, columns,
                          sums);
            }
            for (int64_t i = 0; i < columns; ++i) {
                to[i] += sums.absolute[i];
                to[x.columns + i] += sums.square[i];
                to[2 * x.columns + i] += sums.plain[i];
                double& largest = to[3 * x.columns + i];
                largest = std::max<double>(largest, sums.maximum[i]);
            }
        }
    }
}

template <typename T>
void group_stats(const Activations& x, int64_t begin, int64_t end, double* out) {
    const int64_t groups = x.columns / x.group;
    for (int k = 0; k < kNumActivationStats; ++k) {
        std::fill(out + k * groups + begin, out + k * groups + end, 0.);
    }
    for (int64_t row = 0; row < x.rows; ++row) {
        for (int64_t g = begin; g < end; ++g) {
            const T* const values = static_cast<const T*>(x.data) + row * x.columns + g * x.group;
            Vec squares(0.f);
            int64_t i = 0;
            for (; i + kLanes <= x.group; i += kLanes) {
                const Vec value = load(values + i);
                squares = at::vec::fmadd(value, value, squares);
            }
            if (i < x.group) {
                const Vec value = load(values + i, x.group - i, 0.f);
                squares = at::vec::fmadd(value, value, squares);
            }
            const double square = reduce_add(squares), norm = std::sqrt(square);
            out[g] += norm;
            out[groups + g] += square;
            out[2 * groups + g] += norm;
            double& largest = out[3 * groups + g];
            largest = std::max(largest, norm);
        }
    }
}

}  // namespace

void activation_stats(const Activations& x, int64_t begin, int64_t end, double* out) {
    if (x.group > 1) {
        x.bfloat16 ? group_stats<BFloat16>(x, begin, end, out)
                   : group_stats<float>(x, begin, end, out);
    } else {
        x.bfloat16 ? column_stats<BFloat16>(x, begin, end, out)
                   : column_stats<float>(x, begin, end, out);
    }
}

}  // namespace CPU_CAPABILITY
}  // namespace minitron
