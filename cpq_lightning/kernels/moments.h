/* The derivatives of one element's quantized value, in closed form and as a table of polynomials.

   The mathematics and names are those of functional/categorical.py, truncated.py and mixture.py, which give the
   sources. */
#include "vectors.h"

/* In units of the scale. Further from the grid only ratios of masses matter, and they have reached their limit. */
#define FAR 64
#define EPSILON 1.1920929e-07f
/* exp(-WINDOW) is the weight of the first cell boundary that the expectation leaves out. */
#define WINDOW 15.0f

/* Moments of dy/dz_t over the cell boundaries t, z_t = (t - u)/s: the sum, and the sum weighted with t - n. For "argmax"
   they are divided by the level n. */
typedef struct { vf k0, k1; } moments;

INLINE int reach_of(float s) { return (int)ceilf(WINDOW * (s < 1.0f ? s : 1.0f)) + 1; }

/* v = u - n for the nearest level n; below and above are the numbers of levels of the grid below and above n. */
INLINE moments direct(vf v, vf below, vf above, float s, int reach, int expectation) {
    float is = 1.0f / s;
    vi neg = v < 0;
    vf side = pick(neg, splat(-1.0f), splat(1.0f));
    vf d = magnitude(v), d0 = at_most(d, splat(0.5f));
    /* 1 if x is within half a scale of the grid. */
    vf y = any(d > 0.5f) ? exponential((d0 - d) * is) : splat(1.0f);
    /* Odds at the cell's two boundaries; their product is that of any two boundaries one scale apart. */
    float decay = expf(-is);
    vf right = exponential((d0 - 0.5f) * is), left = decay / right;
    vf lo = -pick(neg, above, below), hi = pick(neg, below, above);
    vf e = exponential((lo - 0.5f - d0) * is), g = exponential((d0 - hi - 0.5f) * is);
    vf te = 1.0f / (1.0f + y * e), tg = 1.0f / (y + g);
    vf s_low = e * te, r_high = g * tg;
    vf mass = tg - s_low, im = 1.0f / mass;
    vf edge_low = e * te * te * im, edge_high = g * tg * tg * im;
    /* False for NaN, so that NaN stays NaN. */
    vi far = y <= EPSILON;
    moments out;
    if (!expectation) {
        vf tl = 1.0f / (1.0f + y * left), tr = 1.0f / (y + right);
        vf mc = tr - left * tl, imc = 1.0f / mc;
        vf cl = left * tl * tl * imc, ch = right * tr * tr * imc;
        vf factor = mc * im;
        out.k0 = pick(far, splat(0.0f), factor * side * ((ch - cl) - (edge_high - edge_low)));
        out.k1 = factor * (0.5f * (ch + cl) - (edge_high * (hi + 0.5f) - edge_low * (lo - 0.5f)));
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
        out.k0 = pick(far, splat(0.0f), at_high - at_low - slope);
        out.k1 = side * (at_high * (hi + 0.5f) - at_low * (lo - 0.5f) - slope_t);
    }
    return out;
}

/* Within one row, every moment is a function of u alone. It is smooth within a cell, equal in all cells far from both
   ends of the grid, constant far outside of the grid, and even or odd under reflection of the grid. A table stores it as
   polynomials, fitted to direct() at Chebyshev points; the lanes of a vector look up their coefficients in registers. */
#define ENTRIES 32
#define DEGREE 10
/* Maximum length of a piece of a cell, in units of sigma; and minimum length of a row for which a table is faster. */
#define STRETCH 3.2f
#define WORTH 512

typedef struct {
    float k0[DEGREE + 1][ENTRIES], off[DEGREE + 1][ENTRIES]; /* off = k1 - v k0, the sum weighted with t - u */
    int entries;
    float pieces, outside, inside; /* pieces per cell; cells outside and inside of the grid's end */
} table;

static double points[DEGREE + 1], to_powers[DEGREE + 1][DEGREE + 1];

/* The matrix from values at Chebyshev points to coefficients of powers. */
__attribute__((constructor)) static void prepare(void) {
    int m = DEGREE + 1;
    double t[DEGREE + 1][DEGREE + 1] = {{0}};
    t[0][0] = 1;
    t[1][1] = 1;
    for (int k = 2; k < m; k++)
        for (int j = 0; j < m; j++) t[k][j] = (j ? 2 * t[k - 1][j - 1] : 0) - t[k - 2][j];
    for (int i = 0; i < m; i++) {
        points[i] = cos(M_PI * (i + 0.5) / m);
        for (int k = 0; k < m; k++)
            for (int j = 0; j < m; j++)
                to_powers[j][i] += (k ? 2.0 : 1.0) / m * cos(M_PI * k * (i + 0.5) / m) * t[k][j];
    }
}

/* Whether a table is used for a row with this s. A small s has few boundaries to sum and would need many pieces. */
static int fits(table *t, float s, float span, int64_t length) {
    t->outside = ceilf(WINDOW * s);
    t->inside = fminf(t->outside, floorf(span / 2));
    t->pieces = ceilf(1.0f / (STRETCH * s));
    float entries = (t->outside + t->inside + 1) * t->pieces;
    t->entries = entries <= ENTRIES ? (int)entries : 0;
#ifndef __AVX2__
    return 0; /* Without an instruction that permutes by a register of indices, a table is slower than direct(). */
#endif
    return t->entries && length >= WORTH * (t->entries > ENTRIES / 2 ? 2 : 1);
}

static void fit(table *t, float s, float span, int reach, int expectation) {
    for (int begin = 0; begin < t->entries; begin += W) {
        float cells[W], starts[W];
        for (int k = 0; k < W; k++) {
            int entry = begin + k < t->entries ? begin + k : t->entries - 1, pieces = (int)t->pieces;
            cells[k] = (float)(entry / pieces) - t->outside;
            starts[k] = (float)(entry % pieces) / t->pieces - 0.5f;
        }
        vf cell = load(cells), level = at_least(cell, splat(0.0f)), start = load(starts);
        float at[2][DEGREE + 1][W];
        for (int m = 0; m <= DEGREE; m++) {
            vf v = (cell - level) + (start + (float)((points[m] + 1) / (2 * t->pieces)));
            moments found = direct(v, level, span - level, s, reach, expectation);
            store(at[0][m], found.k0);
            store(at[1][m], found.k1 - v * found.k0);
        }
        for (int j = 0; j <= DEGREE; j++) {
            double k0[W] = {0}, off[W] = {0};
            for (int m = 0; m <= DEGREE; m++)
                for (int k = 0; k < W; k++) {
                    k0[k] += to_powers[j][m] * at[0][m][k];
                    off[k] += to_powers[j][m] * at[1][m][k];
                }
            for (int k = 0; k < W; k++) {
                t->k0[j][begin + k] = (float)k0[k];
                t->off[j][begin + k] = (float)off[k];
            }
        }
    }
}

/* Look up entries in the first half of a table, or (all) in the full table. */
INLINE vf look(const float *entries, vi index, int all) {
#ifdef __clang__
    vf found;
    for (int k = 0; k < W; k++) found[k] = entries[index[k] & (ENTRIES - 1)];
    return found;
#elif W == 16
    if (!all) return __builtin_shuffle(load(entries), index);
    return __builtin_shuffle(load(entries), load(entries + W), index);
#else
    vf found = __builtin_shuffle(load(entries), load(entries + W), index);
    if (all)
        found = pick(index >= 2 * W, __builtin_shuffle(load(entries + 2 * W), load(entries + 3 * W), index), found);
    return found;
#endif
}

typedef struct { vf dx, dscale, dsigma; } grads;

/* The chain rule from k0 and off = k1 - v k0 to x, scale and sigma. */
INLINE grads chained(vf u, vf n, vf k0, vf off, float s) {
    float is = 1.0f / s;
    grads out;
    out.dx = -k0 * is;
    out.dscale = n + (u * k0 + off) * is;
    out.dsigma = -off * (is * is);
    return out;
}

INLINE grads derive(vf x, float a, float s, float low, float high, int reach, int expectation) {
    float half = half_step(low);
    vf u = clamped(x / a - half, low - half - FAR, high - half + FAR);
    vf n = nearest(clamped(u, low - half, high - half));
    vf v = u - n;
    u += half;
    n += half;
    moments found = direct(v, n - low, high - n, s, reach, expectation);
    vf factor = expectation ? splat(1.0f) : n;
    return chained(u, n, factor * found.k0, factor * (found.k1 - v * found.k0), s);
}

/* Vectors computed together, so that their chains of multiplications run in parallel. */
#define SIDE 2
INLINE void look_up(const vf *x, float a, float s, float low, float high, int expectation, const table *t,
                    int all, int single, grads *out) {
    vf u[SIDE], n[SIDE], z[SIDE], k0[SIDE], off[SIDE];
    vi index[SIDE], mirror[SIDE];
    /* Grids have an even number of levels: no cell is in the middle. */
    float half = half_step(low), middle = (low + high) / 2 - half, furthest = (high - low) / 2 + t->outside;
    for (int h = 0; h < SIDE; h++) {
        u[h] = clamped(x[h] / a - half, low - half - t->outside - 0.49f, high - half + t->outside + 0.49f);
        vf c = nearest(u[h]), v = u[h] - c, from_middle = c - middle;
        n[h] = clamped(c, low - half, high - half) + half;
        u[h] += half;
        /* Reflect if the lowest level is further away than the highest. */
        mirror[h] = ~(vi)from_middle & INT32_MIN;
        v = (vf)((vi)v ^ mirror[h]);
        vf cell = at_most(furthest - magnitude(from_middle), splat(t->inside + t->outside));
        if (single) {
            index[h] = __builtin_convertvector(cell, vi);
            z[h] = 2 * v;
        } else {
            vf place = (v + 0.5f) * t->pieces;
            vf piece = at_most(__builtin_convertvector(__builtin_convertvector(place, vi), vf), splat(t->pieces - 1));
            index[h] = __builtin_convertvector(cell * t->pieces + piece, vi);
            z[h] = 2 * (place - piece) - 1;
        }
        k0[h] = look(t->k0[DEGREE], index[h], all);
        off[h] = look(t->off[DEGREE], index[h], all);
    }
#pragma GCC unroll 16
    for (int j = DEGREE - 1; j >= 0; j--)
        for (int h = 0; h < SIDE; h++) {
            k0[h] = k0[h] * z[h] + look(t->k0[j], index[h], all);
            off[h] = off[h] * z[h] + look(t->off[j], index[h], all);
        }
    for (int h = 0; h < SIDE; h++)
        out[h] = expectation ? chained(u[h], n[h], k0[h], (vf)((vi)off[h] ^ mirror[h]), s)
                             : chained(u[h], n[h], n[h] * (vf)((vi)k0[h] ^ mirror[h]), n[h] * off[h], s);
}
