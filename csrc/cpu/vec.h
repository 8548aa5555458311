// The few vector operations that the kernels need beyond at::vec.
//
// Files that include this are compiled once per instruction set (CPU_CAPABILITY_AVX512, _AVX2, or
// neither) and keep everything in a namespace of that name.

#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include <cstdint>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace minitron {
namespace CPU_CAPABILITY {

using Vec = at::vec::Vectorized<float>;
using c10::BFloat16;
constexpr int64_t kLanes = Vec::size();
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline Vec load(const float* from) { return Vec::loadu(from); }

inline Vec load(const BFloat16* from) {
    Vec out;
    at::vec::load_fp32_from_bf16(from, out);
    return out;
}

// The first `count` < kLanes elements, the others `fill`.
template <typename T>
inline Vec load(const T* from, int64_t count, float fill) {
    alignas(64) T padded[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) padded[i] = i < count ? from[i] : static_cast<T>(fill);
    return load(padded);
}

// Asks for a line that will be read; the address need not exist.
inline void prefetch(const void* address) {
#if defined(__GNUC__)
    __builtin_prefetch(address);
#endif
}

// max(a, b), b where either is NaN.
inline Vec fast_max(const Vec& a, const Vec& b) { return at::vec::clamp_min(b, a); }

inline float reduce_max(const Vec& x) {
    return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return fast_max(a, b); }, x);
}

inline float reduce_add(const Vec& x) {
    return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
}

// 2^f on [0, 1): minimax in the relative error (8e-8) with the value 1 at 0.
inline Vec exp2_fraction(const Vec& f) {
    Vec p = at::vec::fmadd(Vec(1.8671305698204493e-3f), f, Vec(9.01702925326163e-3f));
    p = at::vec::fmadd(p, f, Vec(5.579991387984723e-2f));
    p = at::vec::fmadd(p, f, Vec(2.4016444993680355e-1f));
    p = at::vec::fmadd(p, f, Vec(6.931513118234258e-1f));
    return at::vec::fmadd(p, f, Vec(1.f));
}

// 2^z; what is below 2^−126 may become 0; NaN stays.
inline Vec exp2(const Vec& z) {
#if defined(CPU_CAPABILITY_AVX512)
    const Vec f = _mm512_reduce_ps(z, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    return _mm512_scalef_ps(exp2_fraction(f), z);  // · 2^⌊z⌋
#elif defined(CPU_CAPABILITY_AVX2)
    // Where the exponent's bits are 0, and where they are those of infinity; NaN passes both.
    const __m256 clamped =
        _mm256_min_ps(_mm256_set1_ps(128.f), _mm256_max_ps(_mm256_set1_ps(-127.f), z));
    const __m256 whole = _mm256_floor_ps(clamped);
    const __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    const Vec power = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
    return exp2_fraction(_mm256_sub_ps(clamped, whole)) * power;
#else
    return z.exp2();
#endif
}

// ln x for normal x > 0, to two units in the last place: with x = m 2^e and √½ ≤ m < √2, a
// polynomial in m − 1 (Cephes' logf). Unlike at::vec's, it is no call that every register must be
// saved for.
inline Vec log_of_normal(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i e = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3)), 23);
    const Vec m = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(e, 23)));
    const Vec exponent = _mm512_cvtepi32_ps(e);
#elif defined(CPU_CAPABILITY_AVX2)
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i e = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3)), 23);
    const Vec m = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(e, 23)));
    const Vec exponent = _mm256_cvtepi32_ps(e);
#else
    return x.log();
#endif
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
    const Vec f = m - Vec(1.f), square = f * f;
    Vec p = at::vec::fmadd(Vec(7.0376836292e-2f), f, Vec(-1.1514610310e-1f));
    p = at::vec::fmadd(p, f, Vec(1.1676998740e-1f));
    p = at::vec::fmadd(p, f, Vec(-1.2420140846e-1f));
    p = at::vec::fmadd(p, f, Vec(1.4249322787e-1f));
    p = at::vec::fmadd(p, f, Vec(-1.6668057665e-1f));
    p = at::vec::fmadd(p, f, Vec(2.0000714765e-1f));
    p = at::vec::fmadd(p, f, Vec(-2.4999993993e-1f));
    p = at::vec::fmadd(p, f, Vec(3.3333331174e-1f));
    p = at::vec::fmadd(exponent, Vec(-2.12194440e-4f), p * f * square);
    p = at::vec::fmadd(Vec(-0.5f), square, p);
    return at::vec::fmadd(exponent, Vec(0.693359375f), f + p);
#endif
}

// Where weight > 0: sum + weight · x; elsewhere sum, whatever x is.
inline Vec add_product_where_positive(const Vec& weight, const Vec& x, const Vec& sum) {
#if defined(CPU_CAPABILITY_AVX512)
    const __mmask16 positive = _mm512_cmp_ps_mask(weight, _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_mask3_fmadd_ps(weight, x, sum, positive);
#else
    return Vec::blendv(sum, at::vec::fmadd(weight, x, sum), weight > Vec(0.f));
#endif
}

// sum + x in the lanes whose bits are set.
inline Vec add_lanes(unsigned lanes, const Vec& x, const Vec& sum) {
#if defined(CPU_CAPABILITY_AVX512)
    return _mm512_mask_add_ps(sum, static_cast<__mmask16>(lanes), sum, x);
#elif defined(CPU_CAPABILITY_AVX2)
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(lanes)), bits);
    const __m256 chosen = _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bits));
    return sum + Vec(_mm256_and_ps(chosen, x));
#else
    alignas(64) float values[kLanes];
    x.store(values);
    for (int64_t i = 0; i < kLanes; ++i) values[i] = lanes >> i & 1 ? values[i] : 0.f;
    return sum + load(values);
#endif
}

// Bits of the lanes in which x is not below bound, as NaN never is.
inline unsigned not_below(const Vec& x, const Vec& bound) {
#if defined(CPU_CAPABILITY_AVX512)
    return _mm512_cmp_ps_mask(x, bound, _CMP_NLT_UQ);
#elif defined(CPU_CAPABILITY_AVX2)
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(x, bound, _CMP_NLT_UQ)));
#else
    alignas(64) float values[kLanes], bounds[kLanes];
    x.store(values);
    bound.store(bounds);
    unsigned lanes = 0;
    for (int64_t i = 0; i < kLanes; ++i) lanes |= !(values[i] < bounds[i]) << i;
    return lanes;
#endif
}

// Two vectors to 2 kLanes consecutive elements, rounded to nearest even. Streaming goes past the
// caches, which saves reading the destination first; it needs `to` aligned to a vector.
inline void store_pair(float* to, const Vec& a, const Vec& b, bool streaming) {
#if defined(CPU_CAPABILITY_AVX512)
    if (streaming) {
        _mm512_stream_ps(to, a);
        _mm512_stream_ps(to + kLanes, b);
        return;
    }
#elif defined(CPU_CAPABILITY_AVX2)
    if (streaming) {
        _mm256_stream_ps(to, a);
        _mm256_stream_ps(to + kLanes, b);
        return;
    }
#endif
    a.store(to);
    b.store(to + kLanes);
}

#if defined(CPU_CAPABILITY_AVX512)
// Half the next representable, made even where it is a tie. Unlike at::vec's, it takes no care of
// NaNs whose payload is all ones, which arithmetic does not make.
inline __m512i add_half_bfloat16(const Vec& x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}

inline __m512i round_to_bfloat16(const Vec& a, const Vec& b) {
    alignas(64) static constexpr int16_t kUpperHalves[32] = {
        1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
        33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return _mm512_permutex2var_epi16(add_half_bfloat16(a), _mm512_load_si512(kUpperHalves),
                                     add_half_bfloat16(b));
}
#endif

inline void store_pair(BFloat16* to, const Vec& a, const Vec& b, bool streaming) {
#if defined(CPU_CAPABILITY_AVX512)
    const __m512i rounded = round_to_bfloat16(a, b);
    if (streaming) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to), rounded);
    } else {
        _mm512_storeu_si512(to, rounded);
    }
#else
    const auto rounded = at::vec::convert_from_float<BFloat16>(a, b);
#if defined(CPU_CAPABILITY_AVX2)
    if (streaming) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to), rounded);
        return;
    }
#endif
    rounded.store(to);
#endif
}

inline bool can_stream(const void* to) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
    return reinterpret_cast<uintptr_t>(to) % sizeof(Vec) == 0;
#else
    return false;
#endif
}

// Makes streamed stores visible to other threads.
inline void streaming_fence() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
    _mm_sfence();
#endif
}

}  // namespace CPU_CAPABILITY
}  // namespace minitron
