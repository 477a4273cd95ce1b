/* The elementwise parts of a transformer block and the softmax of its loss, each in one pass over memory. rms_norm.py,
 * layer_norm.py, gelu.py, swiglu.py, rotary.py and cross_entropy.py hold the same in PyTorch, and the tests hold the two
 * together.
 *
 * A kernel gets its arguments as a struct of abi.h, works on the rows [first, last) and touches no others, so that threads
 * can share a call. Arithmetic is in fp32; bf16 is rounded to nearest, ties to even, wherever the definition rounds. Unlike
 * in nf4_cpu.c the last bit is free: fused multiply-adds are welcome. */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { FLOAT32 = 0, BFLOAT16 = 1, BLOCK = 1024 };
#include "common.h"

/* Parts of a long row: within one sums are in fp32, which becomes vectors, and the parts are added in double. */
#define FOR_BLOCKS(start, end, count) \
    for (int64_t start = 0, end; end = start + BLOCK < count ? start + BLOCK : count, start < count; start = end)
/* The dtype is a constant in either copy of the function, so that no loop asks for it. */
#define FOR_BOTH_DTYPES(name, structure)                                          \
    void name(const void *arguments, int64_t first, int64_t last) {               \
        const struct structure a = *(const struct structure *)arguments;          \
        if (a.dtype == FLOAT32) name##_rows(a, first, last, FLOAT32);             \
        else name##_rows(a, first, last, BFLOAT16);                               \
    }

/* -------------------------------------------------------------------------------------------------------- threads */

/* Every thread has a part of the rows that lies at the same place in every job, so that it finds in its cache what it
 * wrote in the last one; it takes that in shares, and then what is left of the others'. */
struct part { _Alignas(64) int64_t next, end, taken; };

struct job {
    kernel *work;
    const void *arguments;
    int64_t share, threads;
    struct part *parts;
};

static _Thread_local int64_t own_part; /* of this thread in its last job */

static void take_shares(void *data) {
    const struct job *job = data;
    for (int64_t tried = 0; tried < job->threads; tried++) { /* in the first job all ask for the first part */
        int64_t number = (own_part + tried) % job->threads;
        if (__atomic_exchange_n(&job->parts[number].taken, 1, __ATOMIC_RELAXED)) continue;
        own_part = number;
        break;
    }
    for (int64_t number = own_part; number < own_part + job->threads; number++) {
        struct part *part = &job->parts[number % job->threads];
        for (;;) {
            int64_t first = __atomic_fetch_add(&part->next, job->share, __ATOMIC_RELAXED), last = first + job->share;
            if (first >= part->end) break;
            job->work(job->arguments, first, last < part->end ? last : part->end);
        }
    }
}

/* Call the kernel over all rows with the threads of PyTorch's own pool; fork_join is GOMP_parallel of its library. */
void share_rows(void *fork_join, kernel *work, const void *arguments, int64_t rows, int64_t threads) {
    typedef void pool(void (*)(void *), void *, unsigned, unsigned);
    struct part parts[threads];
    for (int64_t i = 0; i < threads; i++) parts[i] = (struct part){rows * i / threads, rows * (i + 1) / threads, 0};
    /* rows may differ in work */
    struct job job = {work, arguments, (rows + 4 * threads - 1) / (4 * threads), threads, parts};
    ((pool *)fork_join)(take_shares, &job, (unsigned)threads, 0);
}

/* Calls one after the other, as program.py writes them, each in at most so many threads, and one for least_work at least. */
void run_program(const void *calls, int64_t count, void *fork_join, int64_t threads, int64_t least_work) {
    sharer *share = fork_join ? share_rows : 0;
    for (const struct call *call = calls; call < (const struct call *)calls + count; call++) {
        const void *arguments = (const char *)calls + call->arguments;
        int64_t used = most(1, least(threads, call->work / least_work));
        if (call->items < 0) ((sharing_kernel *)call->kernel)(arguments, share, fork_join, used);
        else share_out((kernel *)call->kernel, arguments, call->items, share, fork_join, used);
    }
}

/* ------------------------------------------------------------------------------------------------------- values */

INLINE float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE uint32_t as_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

/* A NaN stays one: it comes from bf16 values, so that its lower half is empty and nothing is carried into the sign. */
INLINE uint16_t to_bfloat16(float x) {
    uint32_t bits = as_bits(x);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
INLINE float load(const void *x, int64_t i, int dtype) {
    return dtype == FLOAT32 ? ((const float *)x)[i] : as_float((uint32_t)((const uint16_t *)x)[i] << 16);
}
INLINE void store(void *x, int64_t i, float value, int dtype) {
    if (dtype == FLOAT32) ((float *)x)[i] = value;
    else ((uint16_t *)x)[i] = to_bfloat16(value);
}
/* What is left of an intermediate result that PyTorch keeps in the dtype. */
INLINE float rounded(float x, int dtype) { return dtype == FLOAT32 ? x : as_float((uint32_t)to_bfloat16(x) << 16); }
INLINE void *at(const void *x, int64_t i, int dtype) { return (char *)x + i * (dtype == FLOAT32 ? 4 : 2); }

/* e^x for x <= 0, to 1.1 ulp; 0 below the smallest normal number, NaN for NaN.
 * e^x = 2^n e^r with n = round(x / ln 2), so |r| <= ln 2 / 2, where e^r = 1 + r + r^2 q(r); the q of degree 4 with the
 * least largest error is off by 3e-9. Adding 1.5 * 2^23 rounds to a whole number and leaves it in the lowest bits. ln 2
 * is taken in two parts, the first so short that n times it is exact. */
INLINE float exp_negative(float x) {
    const float shift = 0x1.8p23f;
    float shifted = x * 0x1.715476p0f + shift, n = shifted - shift;
    float r = (x - n * 0x1.62p-1f) - n * 0x1.c85fep-10f;
    float q = (((0x1.6a241ap-10f * r + 0x1.1239f2p-7f) * r + 0x1.5558f2p-5f) * r + 0x1.555492p-3f) * r + 0x1.fffffcp-2f;
    float power = as_float((as_bits(shifted) - as_bits(shift) + 127) << 23);
    float result = (q * (r * r) + r + 1.0f) * power;
    return x < -0x1.5d589ep6f ? 0.0f : result;
}

/* ------------------------------------------------------------------------------------------------------- RMS norm */

/* y = w * rounded(x r) with r = 1 / sqrt(mean(x^2) + eps), which is saved for backward. */
INLINE void rms_norm_rows(struct rms_norm a, int64_t first, int64_t last, int dtype) {
    for (int64_t row = first; row < last; row++) {
        const void *x = at(a.x, row * a.columns, dtype);
        void *y = at(a.y, row * a.columns, dtype);
        double total = 0.0;
        FOR_BLOCKS(start, end, a.columns) {
            float part = 0.0f;
#pragma omp simd reduction(+ : part)
            for (int64_t i = start; i < end; i++) part += load(x, i, dtype) * load(x, i, dtype);
            total += part;
        }
        float root = a.roots[row] = (float)(1.0 / sqrt(total / (double)a.columns + a.eps));
#pragma omp simd
        for (int64_t i = 0; i < a.columns; i++)
            store(y, i, load(a.weight, i, dtype) * rounded(load(x, i, dtype) * root, dtype), dtype);
    }
}
FOR_BOTH_DTYPES(rms_norm, rms_norm)

/* dx = r (g w - x r^2 mean(g w x)) */
INLINE void rms_norm_backward_rows(struct rms_norm_backward a, int64_t first, int64_t last, int dtype) {
    for (int64_t row = first; row < last; row++) {
        const void *g = at(a.grad, row * a.columns, dtype), *x = at(a.x, row * a.columns, dtype), *w = a.weight;
        void *grad_x = at(a.grad_x, row * a.columns, dtype);
        double total = 0.0, root = a.roots[row];
        FOR_BLOCKS(start, end, a.columns) {
            float part = 0.0f;
#pragma omp simd reduction(+ : part)
            for (int64_t i = start; i < end; i++) part += load(g, i, dtype) * load(w, i, dtype) * load(x, i, dtype);
            total += part;
        }
        float along = (float)(root * root * (total / (double)a.columns)), scale = a.roots[row];
#pragma omp simd
        for (int64_t i = 0; i < a.columns; i++)
            store(grad_x, i, scale * (load(g, i, dtype) * load(w, i, dtype) - load(x, i, dtype) * along), dtype);
    }
}
FOR_BOTH_DTYPES(rms_norm_backward, rms_norm_backward)

/* ----------------------------------------------------------------------------------------------------- layer norm */

/* total = rounded(x + residual), y = w (total - mean) r + b with r = 1 / sqrt(mean((total - mean)^2) + eps). */
INLINE void add_layer_norm_rows(struct add_layer_norm a, int64_t first, int64_t last, int dtype) {
    for (int64_t row = first; row < last; row++) {
        const void *x = at(a.x, row * a.columns, dtype), *residual = at(a.residual, row * a.columns, dtype);
        void *total = at(a.total, row * a.columns, dtype), *y = at(a.y, row * a.columns, dtype);
        double sum = 0.0, squares = 0.0;
        FOR_BLOCKS(start, end, a.columns) {
            float part = 0.0f;
#pragma omp simd reduction(+ : part)
            for (int64_t i = start; i < end; i++) {
                float added = rounded(load(x, i, dtype) + load(residual, i, dtype), dtype);
                store(total, i, added, dtype);
                part += added;
            }
            sum += part;
        }
        float mean = a.means[row] = (float)(sum / (double)a.columns);
        FOR_BLOCKS(start, end, a.columns) {
            float part = 0.0f;
#pragma omp simd reduction(+ : part)
            for (int64_t i = start; i < end; i++)
                part += (load(total, i, dtype) - mean) * (load(total, i, dtype) - mean);
            squares += part;
        }
        float root = a.roots[row] = (float)(1.0 / sqrt(squares / (double)a.columns + a.eps));
#pragma omp simd
        for (int64_t i = 0; i < a.columns; i++)
            store(y, i, load(a.weight, i, dtype) * ((load(total, i, dtype) - mean) * root) + load(a.bias, i, dtype),
                  dtype);
    }
}
FOR_BOTH_DTYPES(add_layer_norm, add_layer_norm)

/* With n = (total - mean) r: dx = r (g w - mean(g w) - n mean(g w n)) */
INLINE void add_layer_norm_backward_rows(struct add_layer_norm_backward a, int64_t first, int64_t last, int dtype) {
    for (int64_t row = first; row < last; row++) {
        const void *g = at(a.grad, row * a.columns, dtype), *x = at(a.total, row * a.columns, dtype), *w = a.weight;
        void *grad_x = at(a.grad_x, row * a.columns, dtype);
        float mean = a.means[row], root = a.roots[row];
        double sum = 0.0, along = 0.0;
        FOR_BLOCKS(start, end, a.columns) {
            float part = 0.0f, part_along = 0.0f;
#pragma omp simd reduction(+ : part, part_along)
            for (int64_t i = start; i < end; i++) {
                float weighted = load(g, i, dtype) * load(w, i, dtype);
                part += weighted;
                part_along += weighted * (load(x, i, dtype) - mean);
            }
            sum += part;
            along += part_along;
        }
        float offset = (float)(sum / (double)a.columns), slope = (float)(along / (double)a.columns * root * root);
#pragma omp simd
        for (int64_t i = 0; i < a.columns; i++)
            store(grad_x, i,
                  root * (load(g, i, dtype) * load(w, i, dtype) - offset - (load(x, i, dtype) - mean) * slope), dtype);
    }
}
FOR_BOTH_DTYPES(add_layer_norm_backward, add_layer_norm_backward)

/* ----------------------------------------------------------------------------------------------------------- GELU */

/* Phi(x), the normal distribution function, and its density. Phi(-|x|) = erfc(z) / 2 with z = |x| / sqrt(2), where
 * erfc(z) = e^-z^2 t p(t) with t = 1 / (1 + 0.43 z); the p of degree 7 with the least largest relative error is off by
 * 2e-7. */
INLINE float normal_distribution(float x, float *density) {
    float e = exp_negative(-0.5f * x * x), t = 1.0f / (1.0f + 0x1.375a70p-2f * fabsf(x));
    float p = ((0x1.1e7c00p-4f * t - 0x1.2e3730p-2f) * t + 0x1.6edfe8p-2f) * t - 0x1.02a52cp-4f;
    p = (((p * t + 0x1.e209a4p-3f) * t + 0x1.aa8bc6p-3f) * t + 0x1.f371c4p-3f) * t + 0x1.f0bbdap-3f;
    float tail = 0.5f * e * t * p;
    *density = 0.3989422804f * e;
    return x < 0.0f ? tail : 1.0f - tail;
}

INLINE void gelu_rows(struct elementwise a, int64_t first, int64_t last, int dtype) {
    for (int64_t row = first; row < last; row++) {
        const void *x = at(a.x, row * a.columns, dtype);
        void *y = at(a.y, row * a.columns, dtype);
#pragma omp simd
        for (int64_t i = 0; i < a.columns; i++) {
            float value = load(x, i, dtype), density;
            store(y, i, value * normal_distribution(value, &density), dtype);
        }
    }
}
FOR_BOTH_DTYPES(gelu, elementwise)

/* dx = g (Phi(x) + x density(x)), and y = x Phi(x) once more while Phi is at hand, where it is asked for. */
INLINE void gelu_backward_rows(struct gelu_backward a, int64_t first, int64_t last, int dtype) {
    for (int64_t row = first; row < last; row++) {
        const void *grad = at(a.grad, row * a.columns, dtype), *x = at(a.x, row * a.columns, dtype);
        void *grad_x = at(a.grad_x, row * a.columns, dtype), *y = at(a.y, row * a.columns, dtype);
        if (!a.y) {
#pragma omp simd
            for (int64_t i = 0; i < a.columns; i++) {
                float value = load(x, i, dtype), g = load(grad, i, dtype), density;
                float phi = normal_distribution(value, &density);
                store(grad_x, i, g * (phi + value * density), dtype);
            }
            continue;
        }
#pragma omp simd
        for (int64_t i = 0; i < a.columns; i++) {
            float value = load(x, i, dtype), g = load(grad, i, dtype), density;
            float phi = normal_distribution(value, &density);
            store(grad_x, i, g * (phi + value * density), dtype);
            store(y, i, value * phi, dtype);
        }
    }
}
FOR_BOTH_DTYPES(gelu_backward, gelu_backward)

/* --------------------------------------------------------------------------------------------------------- SwiGLU */

/* y = silu(gate) up. The logistic function is taken from e^-|gate| <= 1, which cannot overflow. */
INLINE void swiglu_rows(struct swiglu a, int64_t first, int64_t last, int dtype) {
    for (int64_t row = first; row < last; row++) {
        const void *gate = at(a.gate, row * a.gate_stride, dtype), *up = at(a.up, row * a.up_stride, dtype);
        void *y = at(a.y, row * a.y_stride, dtype);
#pragma omp simd
        for (int64_t i = 0; i < a.columns; i++) {
            float x = load(gate, i, dtype), e = exp_negative(-fabsf(x));
            float silu = x * (x < 0.0f ? e : 1.0f) / (1.0f + e);
            store(y, i, rounded(silu, dtype) * load(up, i, dtype), dtype);
        }
    }
}
FOR_BOTH_DTYPES(swiglu, swiglu)

/* With s = logistic(gate): d gate = g up s (1 + gate (1 - s)), d up = g gate s; and y = gate s up once more while s is
 * at hand. */
INLINE void swiglu_backward_rows(struct swiglu_backward a, int64_t first, int64_t last, int dtype) {
    for (int64_t row = first; row < last; row++) {
        const void *grad = at(a.grad, row * a.grad_stride, dtype), *gate = at(a.gate, row * a.gate_stride, dtype);
        const void *up = at(a.up, row * a.up_stride, dtype);
        void *grad_gate = at(a.grad_gate, row * a.grad_gate_stride, dtype);
        void *grad_up = at(a.grad_up, row * a.grad_up_stride, dtype), *y = at(a.y, row * a.y_stride, dtype);
#pragma omp simd
        for (int64_t i = 0; i < a.columns; i++) {
            float x = load(gate, i, dtype), u = load(up, i, dtype), g = load(grad, i, dtype);
            float e = exp_negative(-fabsf(x)), inverse = 1.0f / (1.0f + e);
            float s = (x < 0.0f ? e : 1.0f) * inverse, opposite = (x < 0.0f ? 1.0f : e) * inverse;
            store(grad_gate, i, g * u * (s * (1.0f + x * opposite)), dtype);
            store(grad_up, i, g * (x * s), dtype);
            store(y, i, rounded(x * s, dtype) * u, dtype);
        }
    }
}
FOR_BOTH_DTYPES(swiglu_backward, swiglu_backward)

/* --------------------------------------------------------------------------------------------------------- rotary */

/* One row holds heads * 2 * half elements. With the halves (a, b) of a head, forwards:
 *     y_a = a cos_a - b sin_a        y_b = b cos_b + a sin_b
 * and the transpose of that matrix backwards:
 *     y_a = a cos_a + b sin_b        y_b = b cos_b - a sin_a */
INLINE void rotary_rows(struct rotary r, int64_t first, int64_t last, int dtype) {
    for (int64_t row = first; row < last; row++) {
        const void *cos_a = at(r.cos, row * 2 * r.half, dtype), *cos_b = at(cos_a, r.half, dtype);
        const void *sin_a = at(r.sin, row * 2 * r.half, dtype), *sin_b = at(sin_a, r.half, dtype);
        const void *from_b = r.transposed ? sin_b : sin_a, *from_a = r.transposed ? sin_a : sin_b;
        float sign = r.transposed ? -1.0f : 1.0f;
        for (int64_t head = 0; head < r.heads; head++) {
            const void *in_a = at(r.x, row * r.x_stride + head * 2 * r.half, dtype), *in_b = at(in_a, r.half, dtype);
            void *out_a = at(r.y, row * r.y_stride + head * 2 * r.half, dtype), *out_b = at(out_a, r.half, dtype);
#pragma omp simd
            for (int64_t i = 0; i < r.half; i++) {
                float a = load(in_a, i, dtype), b = load(in_b, i, dtype);
                float rotated_b = sign * rounded(b * load(from_b, i, dtype), dtype);
                float rotated_a = sign * rounded(a * load(from_a, i, dtype), dtype);
                store(out_a, i, rounded(a * load(cos_a, i, dtype), dtype) - rotated_b, dtype);
                store(out_b, i, rounded(b * load(cos_b, i, dtype), dtype) + rotated_a, dtype);
            }
        }
    }
}
FOR_BOTH_DTYPES(rotary, rotary)

/* -------------------------------------------------------------------------------------------- softmax cross-entropy */

static float largest(const float *x, int64_t count) {
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < count; i++) most = x[i] > most ? x[i] : most;
    return most;
}

/* Mean of x - most, which keeps digits that a mean of large values would lose. */
static double mean_below(const float *x, int64_t count, float most) {
    double total = 0.0;
    FOR_BLOCKS(start, end, count) {
        float part = 0.0f;
#pragma omp simd reduction(+ : part)
        for (int64_t i = start; i < end; i++) part += x[i] - most;
        total += part;
    }
    return total / (double)count;
}

/* Sum of e^(x - most); in_place leaves the terms in x. */
INLINE double sum_of_exponentials(float *x, int64_t count, float most, int in_place) {
    double total = 0.0;
    FOR_BLOCKS(start, end, count) {
        float part = 0.0f;
#pragma omp simd reduction(+ : part)
        for (int64_t i = start; i < end; i++) {
            float e = exp_negative(x[i] - most);
            if (in_place) x[i] = e;
            part += e;
        }
        total += part;
    }
    return total;
}

/* losses[row] = log(sum(e^l)) - (1 - smoothing) l[target] - smoothing mean(l), where the largest logit is taken off
 * every term, and if in_place the logits l become their gradient softmax(l) - smoothing / columns, less 1 - smoothing at
 * the target. The caller has checked that the targets are in range. NaN, +infinity or nothing but -infinity in a row
 * makes its loss NaN. */
void softmax_cross_entropy(const void *arguments, int64_t first, int64_t last) {
    const struct softmax_cross_entropy a = *(const struct softmax_cross_entropy *)arguments;
    for (int64_t row = first; row < last; row++) {
        float *l = a.logits + row * a.columns, most = largest(l, a.columns);
        double wanted = (1.0 - a.smoothing) * ((double)l[a.targets[row]] - most);
        if (a.smoothing != 0.0) wanted += a.smoothing * mean_below(l, a.columns, most);
        double total =
            a.in_place ? sum_of_exponentials(l, a.columns, most, 1) : sum_of_exponentials(l, a.columns, most, 0);
        a.losses[row] = (float)(log(total) - wanted);
        if (!a.in_place) continue;
        float inverse = (float)(1.0 / total), everywhere = (float)(a.smoothing / (double)a.columns);
#pragma omp simd
        for (int64_t i = 0; i < a.columns; i++) l[i] = l[i] * inverse - everywhere;
        l[a.targets[row]] -= (float)(1.0 - a.smoothing);
    }
}

/* ------------------------------------------------------------------ saved for backward, saved_activations.py */

enum { LARGEST = 32767 };

/* Rows of values below 1e-30 are 0, and NaN where one is not finite. */
void quantize_rows(const void *arguments, int64_t first, int64_t last) {
    const struct quantize_rows a = *(const struct quantize_rows *)arguments;
    for (int64_t row = first; row < last; row++) {
        const float *x = a.x + row * a.columns;
        int16_t *values = a.values + row * a.columns;
        uint32_t most = 0;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < a.columns; i++) {
            uint32_t bits = as_bits(x[i]) & 0x7fffffff;
            most = bits > most ? bits : most;
        }
        float scale = most >= 0x7f800000 ? NAN : as_float(most) < 1e-30f ? 0.0f : as_float(most) / LARGEST;
        float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        a.scales[row] = scale;
        if (!(scale > 0.0f)) {
            memset(values, 0, a.columns * sizeof(int16_t));
            continue;
        }
#pragma omp simd
        for (int64_t i = 0; i < a.columns; i++) values[i] = (int16_t)(int32_t)rintf(x[i] * inverse);
    }
}

void dequantize_rows(const void *arguments, int64_t first, int64_t last) {
    const struct dequantize_rows a = *(const struct dequantize_rows *)arguments;
    for (int64_t row = first; row < last; row++) {
        float scale = a.scales[row];
#pragma omp simd
        for (int64_t i = 0; i < a.columns; i++) a.x[row * a.columns + i] = scale * a.values[row * a.columns + i];
    }
}
