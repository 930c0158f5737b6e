/* The quantizer's forward and backward, fused: one read and one write of each element in each direction.

   A tensor consists of rows of equal length, each with a scale and a sigma (a tensor with one scale is one
   row). It is float or bfloat16; all computation is in float.

   Elements are computed in chunks of fixed length, whose sums are added in order, so that results do not depend on the
   number of threads. The threads are torch's (OpenMP): a second pool would compete for cores with torch's threads, which
   spin while they wait for their next loop. */
#include <stdlib.h>

#include "moments.h"

/* Levels are whole numbers plus half (see half_step). */
INLINE vf level(vf x, float scale, float low, float high, float half) {
    return nearest(clamped(x / scale - half, low - half, high - half)) + half;
}

INLINE void forward_part(const void *x, const float *scales, void *out, int64_t begin, int64_t end, int64_t length,
                         float low, float high, int half) {
    float step = half_step(low);
    while (begin < end) {
        int64_t row = begin / length, stop = (row + 1) * length < end ? (row + 1) * length : end;
        float a = scales[row];
        for (; begin + W <= stop; begin += W) put(out, begin, level(get(x, begin, half), a, low, high, step) * a, half);
        if (begin < stop)
            put_some(out, begin, stop - begin, level(get_some(x, begin, stop - begin, half), a, low, high, step) * a, half);
        begin = stop;
    }
}

/* Adds the gradients in scale and sigma of the elements from begin to end to sums, which has two entries for each row,
   starting with the row of begin. */
INLINE void backward_part(const void *x, const void *grad, const float *scales, const float *sigmas, void *dx,
                          double *sums, int64_t begin, int64_t end, int64_t length, float low, float high,
                          int expectation, const table *shared, int half) {
    table of_row;
    for (; begin < end; sums += 2) {
        int64_t row = begin / length, stop = (row + 1) * length < end ? (row + 1) * length : end;
        float a = scales[row], s = sigmas[row] / a;
        int reach = reach_of(s);
        const table *t = shared;
        if (!shared && fits(&of_row, s, high - low, length)) {
            fit(&of_row, s, high - low, reach, expectation);
            t = &of_row;
        }
        while (begin < stop) {
            /* Up to 1024 elements are summed in float, the rest in double. */
            int64_t part = begin + 1024 < stop ? begin + 1024 : stop;
            vf dscale = {0}, sigma = {0};
            for (; t && begin + SIDE * W <= part; begin += SIDE * W) {
                grads d[SIDE];
                vf values[SIDE];
                for (int h = 0; h < SIDE; h++) values[h] = get(x, begin + h * W, half);
                int all = t->entries > ENTRIES / 2, single = t->pieces == 1;
                if (single && !all) look_up(values, a, s, low, high, expectation, t, 0, 1, d);
                else if (single) look_up(values, a, s, low, high, expectation, t, 1, 1, d);
                else if (!all) look_up(values, a, s, low, high, expectation, t, 0, 0, d);
                else look_up(values, a, s, low, high, expectation, t, 1, 0, d);
                for (int h = 0; h < SIDE; h++) {
                    vf g = get(grad, begin + h * W, half);
                    put(dx, begin + h * W, g * d[h].dx, half);
                    dscale += g * d[h].dscale;
                    sigma += g * d[h].dsigma;
                }
            }
            for (; begin + W <= part; begin += W) {
                vf g = get(grad, begin, half);
                grads d = derive(get(x, begin, half), a, s, low, high, reach, expectation);
                put(dx, begin, g * d.dx, half);
                dscale += g * d.dscale;
                sigma += g * d.dsigma;
            }
            if (begin < part) {
                vf g = get_some(grad, begin, part - begin, half);
                grads d = derive(get_some(x, begin, part - begin, half), a, s, low, high, reach, expectation);
                put_some(dx, begin, part - begin, g * d.dx, half);
                dscale += g * d.dscale;
                sigma += g * d.dsigma;
                begin = part;
            }
            for (int k = 0; k < W; k++) {
                sums[0] += dscale[k];
                sums[1] += sigma[k];
            }
        }
    }
}

/* One copy of the loops for each dtype. */
static void forward_of(const void *x, const float *scales, void *out, int64_t begin, int64_t end, int64_t length,
                       float low, float high, int half) {
    if (half) forward_part(x, scales, out, begin, end, length, low, high, 1);
    else forward_part(x, scales, out, begin, end, length, low, high, 0);
}
static void backward_of(const void *x, const void *grad, const float *scales, const float *sigmas, void *dx,
                        double *sums, int64_t begin, int64_t end, int64_t length, float low, float high,
                        int expectation, const table *shared, int half) {
    if (half) backward_part(x, grad, scales, sigmas, dx, sums, begin, end, length, low, high, expectation, shared, 1);
    else backward_part(x, grad, scales, sigmas, dx, sums, begin, end, length, low, high, expectation, shared, 0);
}

void cpq_forward(const void *x, const float *scales, void *out, int64_t n, int64_t length, int64_t chunk, float low,
                 float high, int half) {
#pragma omp parallel for schedule(static) if (n > chunk)
    for (int64_t begin = 0; begin < n; begin += chunk)
        forward_of(x, scales, out, begin, begin + chunk < n ? begin + chunk : n, length, low, high, half);
}

/* dx may be grad. Returns 0 if the memory for the sums cannot be allocated, else 1. */
int cpq_backward(const void *x, const void *grad, const float *scales, const float *sigmas, void *dx, float *dscales,
                 float *dsigmas, int64_t n, int64_t length, int64_t chunk, float low, float high, int expectation,
                 int half) {
    int64_t rows = n / length, each = 2 * (chunk / length + 2), chunks = (n + chunk - 1) / chunk;
    /* For each chunk, two sums for each row that it overlaps. */
    double *sums = calloc(chunks * each, sizeof(double));
    if (!sums) return 0;
    table one, *shared = 0;
    /* All chunks of a single row share its table. */
    if (n == length && fits(&one, sigmas[0] / scales[0], high - low, length)) {
        fit(&one, sigmas[0] / scales[0], high - low, reach_of(sigmas[0] / scales[0]), expectation);
        shared = &one;
    }
#pragma omp parallel for schedule(static) if (n > chunk)
    for (int64_t begin = 0; begin < n; begin += chunk)
        backward_of(x, grad, scales, sigmas, dx, sums + begin / chunk * each, begin,
                    begin + chunk < n ? begin + chunk : n, length, low, high, expectation, shared, half);
    for (int64_t row = 0; row < rows; row++) {
        double dscale = 0, sigma = 0;
        /* The chunks that overlap the row. */
        for (int64_t k = row * length / chunk; k <= ((row + 1) * length - 1) / chunk; k++) {
            const double *of_row = sums + k * each + 2 * (row - k * chunk / length);
            dscale += of_row[0];
            sigma += of_row[1];
        }
        dscales[row] = (float)dscale;
        dsigmas[row] = (float)sigma;
    }
    free(sums);
    return 1;
}

/* Backward of ScaleAndSigma in nn/autograd.py: a few numbers, for which torch would need fifteen operations. */
void cpq_chain(const float *d_scale, const float *d_sigma, const float *start, const float *bend, const float *scale,
               const float *p, const float *sigma, const float *temperature, float *d_log_scale, float *d_logit,
               int64_t n, float root, float noise_min) {
    for (int64_t i = 0; i < n; i++) {
        float factor = 1.0f / (start[i] * root);
        d_log_scale[i] = (d_scale[i] * scale[i] + d_sigma[i] * sigma[i]) * (1 - bend[i] * bend[i]) * factor;
        d_logit[i] = d_sigma[i] * scale[i] * temperature[0] * (p[i] * (1 - p[i])) * ((1 - noise_min) * factor);
    }
}
