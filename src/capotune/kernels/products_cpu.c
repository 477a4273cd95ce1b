/* fp32 products that a library for large ones does slowly: by a low rank, attention over short sequences, and those of few
 * rows with a frozen weight.
 * low_rank.py and attention.py hold the same in PyTorch, and the tests hold the two together.
 *
 * As in elementwise_cpu.c, a kernel gets its arguments as a struct of abi.h and works on the items [first, last): tokens,
 * groups of columns, or pairs of sequence and head. Vectors are GCC's and Clang's own
 * type, which any processor can do; with AVX2 or AVX-512 one is a register. Heads and columns come in eights. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"

#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
enum { LEAST_LANES = 8, TILE = 32, ROWS = 4, KEYS = 8, MOST_RANKS = 48 };
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t whole_vec __attribute__((vector_size(4 * LANES)));
typedef float short_vec __attribute__((vector_size(4 * LEAST_LANES)));
typedef float short_loose __attribute__((vector_size(4 * LEAST_LANES), aligned(4)));

INLINE vec load(const float *x) { return *(const loose *)x; }
INLINE float sum(vec x) {
    float half[LANES / 2];
    for (int i = 0; i < LANES / 2; i++) half[i] = x[i] + x[i + LANES / 2];
    for (int wide = LANES / 4; wide; wide /= 2)
        for (int i = 0; i < wide; i++) half[i] += half[i + wide];
    return half[0];
}

/* ----------------------------------------------------------------------------------------- what both are made of */

/* out[r][c] (+)= sum_j a[r a_row + j a_step] b[j][c] for j from start to end, c < columns, a multiple of LEAST_LANES */
struct multiply {
    float *out;
    int64_t out_stride;
    const float *a;
    int64_t a_row, a_step;
    const float *b;
    int64_t b_stride, start, end, columns;
    int accumulate;
};

#define MULTIPLY_TILE(name, vec, loose, lanes)                                                                     \
    INLINE void name(struct multiply m, int64_t row, int64_t column, int rows, int vectors) {                        \
        vec total[ROWS][2];                                                                                          \
        float *out = m.out + row * m.out_stride + column;                                                            \
        for (int r = 0; r < rows; r++)                                                                               \
            for (int l = 0; l < vectors; l++)                                                                        \
                total[r][l] = m.accumulate ? *(const loose *)(out + r * m.out_stride + l * lanes) : (vec){0};              \
        const float *a = m.a + row * m.a_row, *b = m.b + column;                                                     \
        for (int64_t j = m.start; j < m.end; j++)                                                                    \
            for (int r = 0; r < rows; r++)                                                                           \
                for (int l = 0; l < vectors; l++)                                                                    \
                    total[r][l] += a[r * m.a_row + j * m.a_step] * *(const loose *)(b + j * m.b_stride + l * lanes); \
        for (int r = 0; r < rows; r++)                                                                               \
            for (int l = 0; l < vectors; l++) *(loose *)(out + r * m.out_stride + l * lanes) = total[r][l];          \
    }
MULTIPLY_TILE(multiply_tile, vec, loose, LANES)
MULTIPLY_TILE(multiply_short_tile, short_vec, short_loose, LEAST_LANES)

INLINE void multiply_rows(struct multiply m, int64_t row, int rows) {
    int64_t column = 0;
    for (; column + 2 * LANES <= m.columns; column += 2 * LANES) multiply_tile(m, row, column, rows, 2);
    for (; column + LANES <= m.columns; column += LANES) multiply_tile(m, row, column, rows, 1);
    for (; column < m.columns; column += LEAST_LANES) multiply_short_tile(m, row, column, rows, 1);
}

static void multiply(struct multiply m, int64_t rows) {
    switch (rows) { /* the compiler knows how many, so that the sums stay in registers */
    case 4: multiply_rows(m, 0, 4); break;
    case 3: multiply_rows(m, 0, 3); break;
    case 2: multiply_rows(m, 0, 2); break;
    case 1: multiply_rows(m, 0, 1); break;
    }
}

/* ---------------------------------------------------------------------------------------------------- by a low rank */

/* Four tokens by two ranks at a time, so that few values are loaded for each product */
INLINE void project_tile(const struct low_rank *a, int64_t row, int64_t rank, int rows, int ranks) {
    const float *x = a->x + row * a->x_stride, *matrix = a->matrix + rank * a->columns;
    vec total[ROWS][2] = {{{0}}};
    int64_t i = 0;
    for (; i + LANES <= a->columns; i += LANES)
        for (int r = 0; r < ranks; r++) {
            vec values = load(matrix + r * a->columns + i);
            for (int t = 0; t < rows; t++) total[t][r] += load(x + t * a->x_stride + i) * values;
        }
    for (int t = 0; t < rows; t++)
        for (int r = 0; r < ranks; r++) {
            float rest = sum(total[t][r]);
            for (int64_t j = i; j < a->columns; j++) rest += x[t * a->x_stride + j] * matrix[r * a->columns + j];
            a->xa[(row + t) * a->xa_stride + rank + r] = (float)a->scale * rest;
        }
}

INLINE void project_rows(const struct low_rank *a, int64_t row, int rows) {
    int64_t rank = 0;
    for (; rank + 2 <= a->ranks; rank += 2) project_tile(a, row, rank, rows, 2);
    if (rank < a->ranks) project_tile(a, row, rank, rows, 1);
}

/* xa = scale x matrix^T, tokens [first, last) */
void low_rank_project(const void *arguments, int64_t first, int64_t last) {
    const struct low_rank a = *(const struct low_rank *)arguments;
    int64_t row = first;
    for (; row + ROWS <= last; row += ROWS) project_rows(&a, row, ROWS);
    for (; row < last; row++) project_rows(&a, row, 1);
}

/* x += scale xa matrix, tokens [first, last) */
void low_rank_update(const void *arguments, int64_t first, int64_t last) {
    const struct low_rank a = *(const struct low_rank *)arguments;
    int64_t whole = a.columns / LEAST_LANES * LEAST_LANES;
    float scaled[ROWS * MOST_RANKS];
    for (int64_t row = first; row < last; row += ROWS) {
        int64_t count = last - row < ROWS ? last - row : ROWS;
        for (int64_t t = 0; t < count; t++)
            for (int64_t r = 0; r < a.ranks; r++)
                scaled[t * MOST_RANKS + r] = (float)a.scale * a.xa[(row + t) * a.xa_stride + r];
        float *x = a.x + row * a.x_stride;
        struct multiply delta = {x, a.x_stride, scaled, MOST_RANKS, 1, a.matrix, a.columns, 0, a.ranks, whole, 1};
        multiply(delta, count);
        for (int64_t t = 0; t < count; t++)
            for (int64_t i = whole; i < a.columns; i++)
                for (int64_t r = 0; r < a.ranks; r++)
                    x[t * a.x_stride + i] += scaled[t * MOST_RANKS + r] * a.matrix[r * a.columns + i];
    }
}

/* matrix = scale xa^T x, groups [first, last) of columns: tile by tile of tokens, which stay in the cache for all ranks */
void low_rank_gather(const void *arguments, int64_t first, int64_t last) {
    const struct low_rank a = *(const struct low_rank *)arguments;
    int64_t whole = a.columns / LEAST_LANES, from = first * LEAST_LANES, to = (last < whole ? last : whole) * LEAST_LANES;
    for (int64_t start = 0; start < a.rows; start += TILE) {
        int64_t end = start + TILE < a.rows ? start + TILE : a.rows;
        for (int64_t rank = 0; rank < a.ranks; rank += ROWS) {
            struct multiply sums = {a.matrix + rank * a.columns + from, a.columns, a.xa + rank, 1, a.xa_stride,
                                    a.x + from, a.x_stride, start, end, to - from, start > 0};
            multiply(sums, a.ranks - rank < ROWS ? a.ranks - rank : ROWS);
        }
    }
    for (int64_t rank = 0; rank < a.ranks; rank++)
        for (int64_t i = from; i < to; i++) a.matrix[rank * a.columns + i] *= (float)a.scale;
    for (int64_t column = whole * LEAST_LANES; last > whole && column < a.columns; column++)
        for (int64_t rank = 0; rank < a.ranks; rank++) {
            float total = 0.0f;
            for (int64_t row = 0; row < a.rows; row++) total += a.xa[row * a.xa_stride + rank] * a.x[row * a.x_stride + column];
            a.matrix[rank * a.columns + column] = total * (float)a.scale;
        }
}

/* ---------------------------------------------------------------------------------------------------- frozen weights */

enum { DEPTH = 384, TILE_ROWS = 6, PANEL = 2 * LEAST_LANES };

/* A prepacked P, (terms, columns), lies in panels of 16 columns, [terms][16], zero beyond the last column: it is read in the
 * order in which it lies. */

/* sums += x panel, for up to 6 rows of x: 12 sums, one value of x and two vectors of the panel fill AVX2's 16 registers */
INLINE void add_terms(short_vec sums[TILE_ROWS][2], const float *x, int64_t stride, int rows, const float *panel,
                      int64_t terms) {
    const float *lower = x + TILE_ROWS / 2 * stride;
    for (int64_t j = 0; j < terms; j++, panel += PANEL) {
        short_vec left = *(const short_loose *)panel, right = *(const short_loose *)(panel + LEAST_LANES);
        for (int r = 0; r < rows; r++) {
            float value = r < TILE_ROWS / 2 ? x[r * stride + j] : lower[(r - TILE_ROWS / 2) * stride + j];
            sums[r][0] += value * left;
            sums[r][1] += value * right;
        }
    }
}

/* Terms [start, start + terms) of up to 6 rows of one panel, those before are in y. bias: the panel's; delta: its scale
 * matrix, with the last terms, else none. */
INLINE void panel_tile(const struct prepacked_product_fp32 *a, int64_t row, int rows, int64_t panel, int64_t start,
                       int64_t terms, const float *bias, const float *delta) {
    int64_t column = panel * PANEL, count = a->columns - column;
    float *y = a->y + row * a->y_stride + column, part[TILE_ROWS * PANEL] = {0};
    int64_t stride = a->y_stride;
    if (count < PANEL) { /* a panel that is not full has its sums in a place of their own */
        for (int r = 0; r < rows; r++)
            for (int64_t i = 0; i < count; i++) part[r * PANEL + i] = y[r * stride + i];
        y = part;
        stride = PANEL;
    }
    short_vec sums[TILE_ROWS][2];
    for (int r = 0; r < rows; r++)
        for (int l = 0; l < 2; l++)
            sums[r][l] = *(const short_loose *)((start || a->accumulate ? y + r * stride : bias) + l * LEAST_LANES);
    add_terms(sums, a->x + row * a->x_stride + start, a->x_stride, rows, a->panels + (panel * a->terms + start) * PANEL, terms);
    if (delta) add_terms(sums, a->xa + row * a->xa_stride, a->xa_stride, rows, delta, a->ranks);
    for (int r = 0; r < rows; r++)
        for (int l = 0; l < 2; l++) *(short_loose *)(y + r * stride + l * LEAST_LANES) = sums[r][l];
    if (count < PANEL)
        for (int r = 0; r < rows; r++)
            for (int64_t i = 0; i < count; i++) a->y[(row + r) * a->y_stride + column + i] = part[r * PANEL + i];
}

/* Terms [start, start + terms) of all rows of a panel */
static void panel_rows(const struct prepacked_product_fp32 *a, int64_t panel, int64_t start, int64_t terms) {
    int64_t row = 0, column = panel * PANEL, count = a->columns - column < PANEL ? a->columns - column : PANEL;
    float bias[PANEL] = {0}, scaled[MOST_RANKS * PANEL] = {0};
    int has_delta = a->ranks && start + terms == a->terms;
    for (int64_t i = 0; a->bias && i < count; i++) bias[i] = a->bias[column + i];
    for (int64_t k = 0; has_delta && k < a->ranks; k++)
        for (int64_t i = 0; i < count; i++) scaled[k * PANEL + i] = (float)a->scale * a->matrix[k * a->columns + column + i];
    const float *delta = has_delta ? scaled : NULL;
    for (; row + TILE_ROWS <= a->rows; row += TILE_ROWS) panel_tile(a, row, TILE_ROWS, panel, start, terms, bias, delta);
    switch (a->rows - row) { /* the compiler knows how many rows, so that the sums stay in registers */
    case 5: panel_tile(a, row, 5, panel, start, terms, bias, delta); break;
    case 4: panel_tile(a, row, 4, panel, start, terms, bias, delta); break;
    case 3: panel_tile(a, row, 3, panel, start, terms, bias, delta); break;
    case 2: panel_tile(a, row, 2, panel, start, terms, bias, delta); break;
    case 1: panel_tile(a, row, 1, panel, start, terms, bias, delta); break;
    }
}

/* Panels [first, last), DEPTH terms at a time: their part of a panel stays in the first-level cache for all rows */
static void multiply_panels(const void *arguments, int64_t first, int64_t last) {
    const struct prepacked_product_fp32 a = *(const struct prepacked_product_fp32 *)arguments;
    for (int64_t start = 0; start < a.terms; start += DEPTH) {
        int64_t terms = a.terms - start < DEPTH ? a.terms - start : DEPTH;
        for (int64_t panel = first; panel < last; panel++) panel_rows(&a, panel, start, terms);
    }
}

void prepacked_product_fp32(const void *arguments, sharer *share, void *fork_join, int64_t threads) {
    const struct prepacked_product_fp32 *a = arguments;
    share_out(multiply_panels, a, parts(a->columns, PANEL), share, fork_join, threads);
}

/* ------------------------------------------------------------------------------------- what programs need beside these */

void copy_matrix(const void *arguments, int64_t first, int64_t last) {
    const struct copy_matrix a = *(const struct copy_matrix *)arguments;
    for (int64_t row = first; row < last; row++)
        for (int64_t i = 0; i < a.columns; i++) a.target[row * a.row_stride + i * a.column_stride] = a.source[row * a.columns + i];
}

void select_rows(const void *arguments, int64_t first, int64_t last) {
    const struct select_rows a = *(const struct select_rows *)arguments;
    for (int64_t row = first; row < last; row++)
        memcpy(a.target + row * a.columns, a.source + a.indices[row] * a.columns, a.columns * sizeof(float));
}

void scatter_rows(const void *arguments, int64_t first, int64_t last) {
    const struct scatter_rows a = *(const struct scatter_rows *)arguments;
    for (int64_t row = first; row < last; row++) {
        float *target = a.target + row * a.columns;
        if (a.places[row] < 0) memset(target, 0, a.columns * sizeof(float));
        else memcpy(target, a.source + a.places[row] * a.columns, a.columns * sizeof(float));
    }
}

void add_values(const void *arguments, int64_t first, int64_t last) {
    const struct add_values a = *(const struct add_values *)arguments;
    for (int64_t i = first * a.columns; i < last * a.columns; i++) a.y[i] = a.x[i] + a.z[i];
}

void multiply_by(const void *arguments, int64_t first, int64_t last) {
    const struct multiply_by a = *(const struct multiply_by *)arguments;
    for (int64_t i = first * a.columns; i < last * a.columns; i++) a.y[i] = a.x[i] * a.factors[i];
}

/* -------------------------------------------------------------------------------------- attention of short sequences */

/* A thread's own workspace, some hundreds of kB: too much for a small stack. */
static float *workspace(int64_t elements) {
    float *space = malloc((size_t)elements * sizeof(float));
    if (!space) abort();
    return space;
}

/* columns[c][i] = x[i][c] for the LANES rows x of one block of queries, zeros beyond count */
static void transpose_block(const float *x, int64_t stride, int64_t count, int64_t size, float *columns) {
    int64_t done = 0;
#ifdef __AVX512F__
    for (; done + LANES <= size; done += LANES) {
        __m512i rows[LANES];
        for (int i = 0; i < LANES; i++)
            rows[i] = i < count ? _mm512_loadu_si512(x + i * stride + done) : _mm512_setzero_si512();
        transpose(rows);
        for (int i = 0; i < LANES; i++) _mm512_storeu_si512(columns + (done + i) * LANES, rows[i]);
    }
#endif
    for (int64_t c = done; c < size; c++) *(loose *)(columns + c * LANES) = (vec){0};
    for (int64_t i = 0; i < count; i++)
        for (int64_t c = done; c < size; c++) columns[c * LANES + i] = x[i * stride + c];
}

/* out[j] = sum_c x[j][c] columns[c], a vector over queries, for up to 8 keys or values x */
INLINE void multiply_keys(const float *x, int64_t stride, const float *columns, int64_t size, float *out, int64_t out_stride,
                          int count) {
    vec total[KEYS] = {{0}};
    for (int64_t c = 0; c < size; c++)
        for (int j = 0; j < count; j++) total[j] += x[j * stride + c] * load(columns + c * LANES);
    for (int j = 0; j < count; j++) *(loose *)(out + j * out_stride) = total[j];
}

static void multiply_all_keys(const float *x, int64_t stride, const float *columns, int64_t size, int64_t count, float *out,
                              int64_t out_stride) {
    int64_t j = 0;
    for (; j + KEYS <= count; j += KEYS)
        multiply_keys(x + j * stride, stride, columns, size, out + j * out_stride, out_stride, KEYS);
    x += j * stride;
    out += j * out_stride;
    switch (count - j) { /* one by one each sum would wait for its last term */
    case 7: multiply_keys(x, stride, columns, size, out, out_stride, 7); break;
    case 6: multiply_keys(x, stride, columns, size, out, out_stride, 6); break;
    case 5: multiply_keys(x, stride, columns, size, out, out_stride, 5); break;
    case 4: multiply_keys(x, stride, columns, size, out, out_stride, 4); break;
    case 3: multiply_keys(x, stride, columns, size, out, out_stride, 3); break;
    case 2: multiply_keys(x, stride, columns, size, out, out_stride, 2); break;
    case 1: multiply_keys(x, stride, columns, size, out, out_stride, 1); break;
    }
}

INLINE vec chosen(whole_vec where, vec a, vec b) { return (vec)(((whole_vec)a & where) | ((whole_vec)b & ~where)); }

/* e^x for x <= 0, as exp_negative of elementwise_cpu.c, which says why */
INLINE vec exp_negative(vec x) {
    const vec shift = (vec){0} + 0x1.8p23f;
    vec shifted = x * 0x1.715476p0f + shift, n = shifted - shift;
    vec r = (x - n * 0x1.62p-1f) - n * 0x1.c85fep-10f;
    vec q = (((0x1.6a241ap-10f * r + 0x1.1239f2p-7f) * r + 0x1.5558f2p-5f) * r + 0x1.555492p-3f) * r;
    vec power = (vec)(((whole_vec)shifted - (whole_vec)shift + 127) << 23);
    vec e = ((q + 0x1.fffffcp-2f) * (r * r) + r + 1.0f) * power;
    return chosen(x < -0x1.5d589ep6f, (vec){0}, e); /* of -infinity, NaN until here, too */
}

/* One block of queries: weights[j][i] = softmax over the keys j of scale q_i k_j, LANES queries beside each other; they see
 * so many keys, which is returned. No sum runs along a vector: a short row would leave most of it empty. */
static int64_t weigh(const struct short_attention *a, const float *q, int64_t i, int64_t length, const float *k, float *columns,
                     float *weights, int64_t stride) {
    int64_t count = length - i < LANES ? length - i : LANES, seen = a->causal ? i + count : length;
    transpose_block(q + i * a->q_stride, a->q_stride, count, a->head_size, columns);
    multiply_all_keys(k, a->k_stride, columns, a->head_size, seen, weights, stride);
    for (int64_t j = i + 1; a->causal && j < seen; j++)
        for (int64_t lane = 0; lane < j - i; lane++) weights[j * stride + lane] = -INFINITY;
    vec most = load(weights), total = {0};
    for (int64_t j = 1; j < seen; j++) {
        vec score = load(weights + j * stride);
        most = chosen(score > most, score, most);
    }
    for (int64_t j = 0; j < seen; j++) {
        vec e = exp_negative((float)a->scale * (load(weights + j * stride) - most));
        *(loose *)(weights + j * stride) = e;
        total += e;
    }
    vec inverse = 1.0f / total;
    for (int64_t j = 0; j < seen; j++) *(loose *)(weights + j * stride) *= inverse;
    return seen;
}

/* out[i] = sum_j weights[j][i] x[j] for the queries of a block */
static void mix(const float *weights, int64_t stride, int64_t seen, const float *x, int64_t x_stride, int64_t count, float *out,
                int64_t width, int64_t size) {
    for (int64_t i = 0; i < count; i += ROWS) {
        struct multiply mixed = {out + i * width, width, weights + i, 1, stride, x, x_stride, 0, seen, size, 0};
        multiply(mixed, count - i < ROWS ? count - i : ROWS);
    }
}

/* Items are pairs of sequence and key-value head; out of each query head's q_i: softmax(scale q_i K^T) V */
void short_attention(const void *arguments, int64_t first, int64_t last) {
    const struct short_attention a = *(const struct short_attention *)arguments;
    int64_t key_heads = a.heads / a.heads_per_key, width = a.heads * a.head_size;
    float *columns = workspace(LANES * (a.head_size + a.longest)), *weights = columns + LANES * a.head_size;
    for (int64_t item = first; item < last; item++) {
        int64_t start = a.starts[item / key_heads], length = a.starts[item / key_heads + 1] - start, head = item % key_heads;
        const float *k = a.k + start * a.k_stride + head * a.head_size, *v = a.v + start * a.v_stride + head * a.head_size;
        for (int64_t h = head * a.heads_per_key; h < (head + 1) * a.heads_per_key; h++)
            for (int64_t i = 0; i < length; i += LANES) {
                const float *q = a.q + start * a.q_stride + h * a.head_size;
                int64_t seen = weigh(&a, q, i, length, k, columns, weights, LANES);
                mix(weights, LANES, seen, v, a.v_stride, length - i < LANES ? length - i : LANES,
                    a.out + (start + i) * width + h * a.head_size, width, a.head_size);
            }
    }
    free(columns);
}

/* With P the softmax, computed again: dV = P^T dO, dP = dO V^T, dS = scale P (dP - sum(P dP)), dQ = dS K, dK = dS^T Q.
 * P and dS lie as [key][query]. */
void short_attention_backward(const void *arguments, int64_t first, int64_t last) {
    const struct short_attention a = *(const struct short_attention *)arguments;
    int64_t key_heads = a.heads / a.heads_per_key, width = a.heads * a.head_size, key_width = key_heads * a.head_size;
    int64_t most = (a.longest + LANES - 1) / LANES * LANES;
    float *columns = workspace(LANES * a.head_size + 2 * a.longest * most), *weights = columns + LANES * a.head_size;
    float *slopes = weights + a.longest * most;
    for (int64_t item = first; item < last; item++) {
        int64_t start = a.starts[item / key_heads], length = a.starts[item / key_heads + 1] - start, head = item % key_heads;
        const float *k = a.k + start * a.k_stride + head * a.head_size, *v = a.v + start * a.v_stride + head * a.head_size;
        for (int64_t h = head * a.heads_per_key; h < (head + 1) * a.heads_per_key; h++) {
            const float *q = a.q + start * a.q_stride + h * a.head_size, *grad = a.grad + start * width + h * a.head_size;
            for (int64_t i = 0; i < length; i += LANES) {
                int64_t count = length - i < LANES ? length - i : LANES;
                float *p = weights + i, *s = slopes + i;
                int64_t seen = weigh(&a, q, i, length, k, columns, p, most);
                transpose_block(grad + i * width, width, count, a.head_size, columns);
                multiply_all_keys(v, a.v_stride, columns, a.head_size, seen, s, most);
                vec along = {0};
                for (int64_t j = 0; j < seen; j++) along += load(p + j * most) * load(s + j * most);
                for (int64_t j = 0; j < seen; j++)
                    *(loose *)(s + j * most) = (float)a.scale * load(p + j * most) * (load(s + j * most) - along);
                for (int64_t j = seen; j < length && j < seen + ROWS; j++) /* keys that are taken together with seen ones below */
                    *(loose *)(p + j * most) = *(loose *)(s + j * most) = (vec){0};
                mix(s, most, seen, k, a.k_stride, count, a.grad_q + (start + i) * width + h * a.head_size, width, a.head_size);
            }
            int accumulate = h > head * a.heads_per_key;
            for (int64_t j = 0; j < length; j += ROWS) {
                int64_t count = length - j < ROWS ? length - j : ROWS;
                /* queries before j do not look at it; of its own four, those that do not have zeros there */
                int64_t from = a.causal ? j : 0, place = (start + j) * key_width + head * a.head_size;
                struct multiply of_v = {a.grad_v + place, key_width, weights + j * most, most, 1, grad, width, from, length,
                                        a.head_size, accumulate};
                struct multiply of_k = {a.grad_k + place, key_width, slopes + j * most, most, 1, q, a.q_stride, from, length,
                                        a.head_size, accumulate};
                multiply(of_v, count);
                multiply(of_k, count);
            }
        }
    }
    free(columns);
}
