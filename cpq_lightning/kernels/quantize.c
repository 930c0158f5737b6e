/* The quantizer's forward and backward of one ring, fused: one read and one write of each element each way.

   The mathematics is that of functional/categorical.py, truncated.py and mixture.py, which say where it comes from; names
   are theirs. A tensor is rows of equal length, each with a step and a noise of its own (a tensor with one step is one
   row). Vectors are the compiler's own (gcc, clang): no intrinsics, whatever the machine has.

   Elements are worked on in chunks of fixed length, whose sums are added up in order by the caller: results do not depend
   on the number of threads. Those are torch's own, by OpenMP: a pool beside it would fight for the cores with threads of
   torch's that wait for their next loop. */
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

static inline vf load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
static inline void store(float *p, vf v) { memcpy(p, &v, sizeof v); }
static inline vf splat(float a) { return (vf){0} + a; }
static inline vf pick(vi m, vf a, vf b) { return (vf)((m & (vi)a) | (~m & (vi)b)); }
/* NaN stays NaN: a comparison with it is false. */
static inline vf at_most(vf a, vf b) { return pick(a > b, b, a); }
static inline vf at_least(vf a, vf b) { return pick(a < b, b, a); }
static inline vf magnitude(vf a) { return (vf)((vi)a & 0x7fffffff); }

/* To the nearest, ties to even; exact below 2^22, and levels end at 2^8. */
static inline vf nearest(vf a) {
    vf big = splat(12582912.0f);
    a = at_least(at_most(a, splat(4194304.0f)), splat(-4194304.0f));
    return (a + big) - big;
}

/* exp by 2^n times a polynomial on half a binade to each side (Cephes' expf), relative error below 2e-7. */
static inline vf exponential(vf x) {
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

static inline int any(vi m) {
    int64_t parts[W / 2], found = 0;
    memcpy(parts, &m, sizeof m);
    for (int k = 0; k < W / 2; k++) found |= parts[k];
    return found != 0;
}

static inline vf level(vf x, float step, float low, float high) {
    return at_least(at_most(nearest(x / step), splat(high)), splat(low));
}

/* Beyond this many steps from the grid only ratios of masses matter, and they have reached their limit. */
#define FAR 64
#define EPSILON 1.1920929e-07f
/* exp(-WINDOW) is the weight of the first cell boundary that the expectation leaves out. */
#define WINDOW 15.0f

typedef struct { vf dx, dstep, dsigma; } grads;

static inline grads derive(vf x, float a, float s, float low, float high, int reach, int expectation) {
    float is = 1.0f / s;
    vf u = at_most(at_least(x / a, splat(low - FAR)), splat(high + FAR));
    vf n = at_least(at_most(nearest(u), splat(high)), splat(low));
    vf v = u - n;
    vi neg = v < 0;
    vf side = pick(neg, splat(-1.0f), splat(1.0f));
    vf d = magnitude(v), d0 = at_most(d, splat(0.5f));
    /* 1 wherever x is within half a step of the grid. */
    vf y = any(d > 0.5f) ? exponential((d0 - d) * is) : splat(1.0f);
    /* Odds of the cell's two boundaries; their product is that of any two that are a step apart. */
    float decay = expf(-is);
    vf right = exponential((d0 - 0.5f) * is), left = decay / right;
    vf lo = pick(neg, n - high, low - n), hi = pick(neg, n - low, high - n);
    vf e = exponential((lo - 0.5f - d0) * is), g = exponential((d0 - hi - 0.5f) * is);
    vf te = 1.0f / (1.0f + y * e), tg = 1.0f / (y + g);
    vf s_low = e * te, r_high = g * tg;
    vf mass = tg - s_low, im = 1.0f / mass;
    vf edge_low = e * te * te * im, edge_high = g * tg * tg * im;
    vf k0, k1;
    vi near = y > EPSILON;
    if (!expectation) {
        vf tl = 1.0f / (1.0f + y * left), tr = 1.0f / (y + right);
        vf mc = tr - left * tl, imc = 1.0f / mc;
        vf cl = left * tl * tl * imc, ch = right * tr * tr * imc;
        vf scale = n * mc * im;
        k0 = pick(near, scale * side * ((ch - cl) - (edge_high - edge_low)), splat(0.0f));
        k1 = scale * (0.5f * (ch + cl) - (edge_high * (hi + 0.5f) - edge_low * (lo - 0.5f)));
    } else {
        vf mean = s_low * at_most(-lo, splat((float)reach)) - r_high * at_most(hi, splat((float)reach));
        vf slope = {0}, slope_t = {0};
        for (int j = 0; j < reach; j++) {
            vf l = pick(lo > -j - 0.5f, splat(0.0f), left);
            vf r = pick(hi < j + 0.5f, splat(0.0f), right);
            vf tl = 1.0f + y * l, tr = 1.0f + r;
            vf q = 1.0f / (tl * tr);
            vf ql = q * tr, qr = q * tl;
            vf ml = l * ql, mr = r * qr;
            vf sl = ml * ql, sr = mr * qr;
            mean += mr - ml;
            slope += sl + sr;
            slope_t += (j + 0.5f) * (sr - sl);
            left *= decay;
            right *= decay;
        }
        mean *= im; slope *= im; slope_t *= im;
        vf at_high = (hi - mean) * edge_high, at_low = (lo - mean) * edge_low;
        k0 = pick(near, at_high - at_low - slope, splat(0.0f));
        k1 = side * (at_high * (hi + 0.5f) - at_low * (lo - 0.5f) - slope_t);
    }
    grads out;
    out.dx = -k0 * is;
    out.dstep = n + (n * k0 + k1) * is;
    out.dsigma = -(k1 - v * k0) * (is * is);
    return out;
}

static void forward_part(const float *x, const float *steps, float *out, int64_t begin, int64_t end, int64_t length,
                         float low, float high) {
    while (begin < end) {
        int64_t row = begin / length, stop = (row + 1) * length < end ? (row + 1) * length : end;
        float a = steps[row];
        for (; begin + W <= stop; begin += W) store(out + begin, level(load(x + begin), a, low, high) * a);
        if (begin < stop) {
            float some[W] = {0};
            memcpy(some, x + begin, (stop - begin) * sizeof(float));
            store(some, level(load(some), a, low, high) * a);
            memcpy(out + begin, some, (stop - begin) * sizeof(float));
            begin = stop;
        }
    }
}

/* Adds to sums, two a row, the gradients of its step and its noise: of the elements from begin to end. */
static void backward_part(const float *x, const float *grad, const float *steps, const float *sigmas, float *dx,
                          double *sums, int64_t begin, int64_t end, int64_t length, float low, float high,
                          int expectation) {
    while (begin < end) {
        int64_t row = begin / length, stop = (row + 1) * length < end ? (row + 1) * length : end;
        float a = steps[row], s = sigmas[row] / a;
        int reach = (int)ceilf(WINDOW * (s < 1.0f ? s : 1.0f)) + 1;
        while (begin < stop) {
            /* Short sums in float, long ones in double. */
            int64_t part = begin + 1024 < stop ? begin + 1024 : stop;
            vf step = {0}, sigma = {0};
            for (; begin + W <= part; begin += W) {
                vf g = load(grad + begin);
                grads d = derive(load(x + begin), a, s, low, high, reach, expectation);
                store(dx + begin, g * d.dx);
                step += g * d.dstep;
                sigma += g * d.dsigma;
            }
            if (begin < part) {
                float some[W] = {0}, its[W] = {0};
                memcpy(some, x + begin, (part - begin) * sizeof(float));
                memcpy(its, grad + begin, (part - begin) * sizeof(float));
                vf g = load(its);
                grads d = derive(load(some), a, s, low, high, reach, expectation);
                store(some, g * d.dx);
                memcpy(dx + begin, some, (part - begin) * sizeof(float));
                step += g * d.dstep;
                sigma += g * d.dsigma;
                begin = part;
            }
            for (int k = 0; k < W; k++) {
                sums[2 * row] += step[k];
                sums[2 * row + 1] += sigma[k];
            }
        }
    }
}

void cpq_forward(const float *x, const float *steps, float *out, int64_t n, int64_t length, int64_t chunk, float low,
                 float high) {
#pragma omp parallel for schedule(static) if (n > chunk)
    for (int64_t begin = 0; begin < n; begin += chunk)
        forward_part(x, steps, out, begin, begin + chunk < n ? begin + chunk : n, length, low, high);
}

/* sums: for each chunk two a row, all zero before. */
void cpq_backward(const float *x, const float *grad, const float *steps, const float *sigmas, float *dx, double *sums,
                  int64_t n, int64_t length, int64_t chunk, float low, float high, int expectation) {
    int64_t each = 2 * (n / length);
#pragma omp parallel for schedule(static) if (n > chunk)
    for (int64_t begin = 0; begin < n; begin += chunk)
        backward_part(x, grad, steps, sigmas, dx, sums + begin / chunk * each, begin,
                      begin + chunk < n ? begin + chunk : n, length, low, high, expectation);
}
