/* Vectors of floats with the vector extensions of gcc and clang, which compile for every processor. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define W 16
#else
#define W 8
#endif
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
#define INLINE static inline __attribute__((always_inline))

INLINE vf splat(float a) { return (vf){0} + a; }
INLINE vf pick(vi m, vf a, vf b) { return (vf)((m & (vi)a) | (~m & (vi)b)); }
/* NaN stays NaN: a comparison with it is false. gcc does not turn pick() into one instruction, so builtins name it. */
#if defined(__AVX512F__) && !defined(__clang__)
INLINE vf at_most(vf a, vf b) { return __builtin_ia32_minps512_mask(b, a, a, -1, 4); }
INLINE vf at_least(vf a, vf b) { return __builtin_ia32_maxps512_mask(b, a, a, -1, 4); }
#elif defined(__AVX__) && !defined(__clang__)
INLINE vf at_most(vf a, vf b) { return __builtin_ia32_minps256(b, a); }
INLINE vf at_least(vf a, vf b) { return __builtin_ia32_maxps256(b, a); }
#else
INLINE vf at_most(vf a, vf b) { return pick(a > b, b, a); }
INLINE vf at_least(vf a, vf b) { return pick(a < b, b, a); }
#endif
INLINE vf clamped(vf a, float low, float high) { return at_least(at_most(a, splat(high)), splat(low)); }
INLINE vf magnitude(vf a) { return (vf)((vi)a & 0x7fffffff); }

INLINE vf load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

/* Load and store elements of a tensor: float, or (half) bfloat16, which is the upper half of a float. */
INLINE vf get(const void *p, int64_t at, int half) {
    if (!half) return load((const float *)p + at);
    vh v;
    memcpy(&v, (const uint16_t *)p + at, sizeof v);
    return (vf)(__builtin_convertvector(v, vi) << 16);
}
INLINE void put(void *p, int64_t at, vf v, int half) {
    if (!half) {
        store((float *)p + at, v);
        return;
    }
    /* Round to nearest, ties to even, as torch does. */
    vi bits = (vi)v, odd = (bits >> 16) & 1, rounded = ((bits + 0x7fff + odd) >> 16) & 0xffff, nan = v != v;
    vh h = __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), vh);
    memcpy((uint16_t *)p + at, &h, sizeof h);
}
INLINE vf get_some(const void *p, int64_t at, int64_t count, int half) {
    float some[W] = {0};
    int64_t size = half ? 2 : 4;
    memcpy(some, (const char *)p + at * size, count * size);
    return get(some, 0, half);
}
INLINE void put_some(void *p, int64_t at, int64_t count, vf v, int half) {
    float some[W];
    int64_t size = half ? 2 : 4;
    put(some, 0, v, half);
    memcpy((char *)p + at * size, some, count * size);
}

/* The part of a scale by which all levels of a grid are shifted from whole numbers: 1/2 for a balanced grid, else 0. */
INLINE float half_step(float low) { return low - floorf(low); }

/* Round to nearest, ties to even, for magnitudes below 2^22. */
INLINE vf nearest(vf a) {
    vf big = splat(12582912.0f);
    return (a + big) - big;
}

/* exp as 2^n times a polynomial on [-ln(2)/2, ln(2)/2] (Cephes' expf), relative error below 2e-7. */
INLINE vf exponential(vf x) {
    x = at_most(at_least(x, splat(-87.0f)), splat(88.0f));
    vf n = nearest(x * 1.44269504088896341f);
    vf f = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    return p * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
}

INLINE int any(vi m) {
    int64_t parts[W / 2], found = 0;
    memcpy(parts, &m, sizeof m);
    for (int k = 0; k < W / 2; k++) found |= parts[k];
    return found != 0;
}
