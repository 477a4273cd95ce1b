/* Small fp32 products that a library for large ones does slowly: by a low rank, and attention over short sequences.
 * low_rank.py and attention.py hold the same in PyTorch, and the tests hold the two together.
 *
 * As in elementwise_cpu.c, a kernel gets its arguments as a struct of 8-byte fields and works on the items [first, last):
 * tokens, groups of columns, or pairs of sequence and head. Strides count numbers. Vectors are GCC's and Clang's own
 * type, which any processor can do; with AVX2 eight numbers are one register. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define INLINE static inline __attribute__((always_inline))
enum { LANES = 8, TILE = 32, ROWS = 4 };
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4)));

INLINE vec load(const float *x) { return *(const loose *)x; }
INLINE void store(float *x, vec value) { *(loose *)x = value; }
INLINE vec all(float x) { return x - (vec){0}; }
INLINE float sum(vec x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

/* Call body(rank, count) for ranks in eights, then fours, then one by one; count is a constant in each. */
#define FOR_RANKS(ranks, body)                         \
    do {                                               \
        int64_t rank = 0;                              \
        for (; rank + 8 <= ranks; rank += 8) body(8);  \
        for (; rank + 4 <= ranks; rank += 4) body(4);  \
        for (; rank < ranks; rank++) body(1);          \
    } while (0)

/* ---------------------------------------------------------------------------------------------------- by a low rank */

struct low_rank {
    int64_t rows, columns, ranks;
    float *x;       /* (rows, columns), rows x_stride apart */
    float *low;     /* (rows, ranks), rows low_stride apart */
    float *matrix;  /* (ranks, columns) */
    int64_t x_stride, low_stride;
    double scale;
};

INLINE void project_ranks(const float *x, const float *matrix, int64_t columns, float scale, float *low, int count) {
    vec total[8] = {{0}};
    int64_t i = 0;
    for (; i + LANES <= columns; i += LANES) {
        vec numbers = load(x + i);
        for (int r = 0; r < count; r++) total[r] += numbers * load(matrix + r * columns + i);
    }
    for (int r = 0; r < count; r++) {
        float rest = sum(total[r]);
        for (int64_t j = i; j < columns; j++) rest += x[j] * matrix[r * columns + j];
        low[r] = scale * rest;
    }
}

/* low = scale x matrix^T, tokens [first, last) */
void low_rank_project(const void *arguments, int64_t first, int64_t last) {
    const struct low_rank a = *(const struct low_rank *)arguments;
    for (int64_t row = first; row < last; row++) {
        const float *x = a.x + row * a.x_stride;
        float *low = a.low + row * a.low_stride, scale = (float)a.scale;
#define BODY(count) project_ranks(x, a.matrix + rank * a.columns, a.columns, scale, low + rank, count)
        FOR_RANKS(a.ranks, BODY);
#undef BODY
    }
}

INLINE void update_ranks(float *x, const float *matrix, int64_t columns, const float *low, float scale, int count) {
    vec factor[8];
    for (int r = 0; r < count; r++) factor[r] = all(scale * low[r]);
    int64_t i = 0;
    for (; i + LANES <= columns; i += LANES) {
        vec total = load(x + i);
        for (int r = 0; r < count; r++) total += factor[r] * load(matrix + r * columns + i);
        store(x + i, total);
    }
    for (; i < columns; i++)
        for (int r = 0; r < count; r++) x[i] += factor[r][0] * matrix[r * columns + i];
}

/* x += scale low matrix, tokens [first, last) */
void low_rank_update(const void *arguments, int64_t first, int64_t last) {
    const struct low_rank a = *(const struct low_rank *)arguments;
    for (int64_t row = first; row < last; row++) {
        float *x = a.x + row * a.x_stride, scale = (float)a.scale;
        const float *low = a.low + row * a.low_stride;
#define BODY(count) update_ranks(x, a.matrix + rank * a.columns, a.columns, low + rank, scale, count)
        FOR_RANKS(a.ranks, BODY);
#undef BODY
    }
}

INLINE void gather_ranks(const struct low_rank *a, int64_t start, int64_t end, int64_t column, int64_t rank, int count) {
    vec total[8];
    float *matrix = a->matrix + rank * a->columns + column;
    for (int r = 0; r < count; r++) total[r] = start ? load(matrix + r * a->columns) : (vec){0};
    for (int64_t row = start; row < end; row++) {
        vec numbers = load(a->x + row * a->x_stride + column);
        const float *low = a->low + row * a->low_stride + rank;
        for (int r = 0; r < count; r++) total[r] += numbers * low[r];
    }
    for (int r = 0; r < count; r++) store(matrix + r * a->columns, end == a->rows ? total[r] * (float)a->scale : total[r]);
}

/* matrix = scale low^T x, columns [8 first, 8 last): tile by tile of tokens, which stay in the cache for all columns */
void low_rank_gather(const void *arguments, int64_t first, int64_t last) {
    const struct low_rank a = *(const struct low_rank *)arguments;
    int64_t whole = a.columns / LANES, end_column = last < whole ? last : whole;
    for (int64_t start = 0; start < a.rows; start += TILE) {
        int64_t end = start + TILE < a.rows ? start + TILE : a.rows;
        for (int64_t group = first; group < end_column; group++) {
#define BODY(count) gather_ranks(&a, start, end, group * LANES, rank, count)
            FOR_RANKS(a.ranks, BODY);
#undef BODY
        }
    }
    for (int64_t column = whole * LANES; last > whole && column < a.columns; column++)
        for (int64_t rank = 0; rank < a.ranks; rank++) {
            float total = 0.0f;
            for (int64_t row = 0; row < a.rows; row++) total += a.low[row * a.low_stride + rank] * a.x[row * a.x_stride + column];
            a.matrix[rank * a.columns + column] = total * (float)a.scale;
        }
}

/* -------------------------------------------------------------------------------------- attention of short sequences */

struct short_attention {
    int64_t heads, shared, size, causal;  /* query heads, how many of them share a key-value head, numbers in a head */
    const int64_t *starts;
    const float *q, *k, *v;
    int64_t q_stride, k_stride, v_stride; /* between tokens; heads lie side by side */
    double scale;
    float *out;                           /* (tokens, heads, size) */
    const float *grad;                    /* the same */
    float *grad_q, *grad_k, *grad_v;      /* (tokens, query or key-value heads, size) */
    int64_t longest;                      /* tokens of the longest sequence */
};

/* Room for a thread's own numbers, some hundreds of kB: too much for a small stack. */
static float *room(int64_t numbers) {
    float *space = malloc((size_t)numbers * sizeof(float));
    if (!space) abort();
    return space;
}

/* columns[c][j] = x[j][c] for j < length, zeros up to a whole vector */
static void transpose(const float *x, int64_t stride, int64_t length, int64_t padded, int64_t size, float *columns) {
    for (int64_t c = 0; c < size; c++) {
        for (int64_t j = 0; j < length; j++) columns[c * padded + j] = x[j * stride + c];
        for (int64_t j = length; j < padded; j++) columns[c * padded + j] = 0.0f;
    }
}

/* out[r][c] (+)= sum_j a[r a_row + j a_step] b[j][c] for j from start to end, c < columns, a multiple of LANES */
struct multiply {
    float *out;
    int64_t out_stride;
    const float *a;
    int64_t a_row, a_step;
    const float *b;
    int64_t b_stride, start, end, columns;
    int onto;
};

INLINE void multiply_tile(struct multiply m, int64_t row, int64_t column, int rows, int vectors) {
    vec total[ROWS][2];
    float *out = m.out + row * m.out_stride + column;
    for (int r = 0; r < rows; r++)
        for (int l = 0; l < vectors; l++)
            total[r][l] = m.onto ? load(out + r * m.out_stride + l * LANES) : (vec){0};
    const float *a = m.a + row * m.a_row, *b = m.b + column;
    for (int64_t j = m.start; j < m.end; j++)
        for (int r = 0; r < rows; r++)
            for (int l = 0; l < vectors; l++)
                total[r][l] += a[r * m.a_row + j * m.a_step] * load(b + j * m.b_stride + l * LANES);
    for (int r = 0; r < rows; r++)
        for (int l = 0; l < vectors; l++) store(out + r * m.out_stride + l * LANES, total[r][l]);
}

INLINE void multiply_rows(struct multiply m, int64_t row, int rows) {
    int64_t column = 0;
    for (; column + 2 * LANES <= m.columns; column += 2 * LANES) multiply_tile(m, row, column, rows, 2);
    for (; column < m.columns; column += LANES) multiply_tile(m, row, column, rows, 1);
}

static void multiply(struct multiply m, int64_t rows) {
    if (rows == ROWS) multiply_rows(m, 0, ROWS);
    else for (int64_t row = 0; row < rows; row++) multiply_rows(m, row, 1);
}

/* Row by row softmax of scale row[0..seen), zeros up to end. e^x as exp_negative of elementwise_cpu.c, which says why. */
INLINE void softmax(float *row, int64_t seen, int64_t end, float scale) {
    float most = -INFINITY, total = 0.0f;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < seen; j++) most = row[j] > most ? row[j] : most;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < seen; j++) {
        const float shift = 0x1.8p23f;
        float x = scale * (row[j] - most);
        float shifted = x * 0x1.715476p0f + shift, n = shifted - shift;
        float r = (x - n * 0x1.62p-1f) - n * 0x1.c85fep-10f;
        float q = (((0x1.6a241ap-10f * r + 0x1.1239f2p-7f) * r + 0x1.5558f2p-5f) * r + 0x1.555492p-3f) * r;
        union { float f; uint32_t u; } bits = {shifted}, base = {shift}, power;
        power.u = (bits.u - base.u + 127) << 23;
        float e = ((q + 0x1.fffffcp-2f) * (r * r) + r + 1.0f) * power.f;
        row[j] = x < -0x1.5d589ep6f ? 0.0f : e;
        total += row[j];
    }
    float inverse = 1.0f / total;
#pragma omp simd
    for (int64_t j = 0; j < seen; j++) row[j] *= inverse;
    for (int64_t j = seen; j < end; j++) row[j] = 0.0f;
}

INLINE int64_t whole_vectors(int64_t length) { return (length + LANES - 1) / LANES * LANES; }

/* Weights of the queries i to i + count: softmax(scale q K^T), zeros where a query does not look; returns where all end */
static int64_t weigh(const struct short_attention *a, const float *q, int64_t i, int64_t count, const float *keys,
                     int64_t length, int64_t padded, float *weights) {
    int64_t end = a->causal ? whole_vectors(i + count) : padded;
    struct multiply scores = {weights, padded, q + i * a->q_stride, a->q_stride, 1, keys, padded, 0, a->size, end, 0};
    multiply(scores, count);
    for (int64_t r = 0; r < count; r++)
        softmax(weights + r * padded, a->causal ? i + r + 1 : length, end, (float)a->scale);
    return end < length ? end : length;
}

/* Items are pairs of sequence and key-value head; out of each query head's q_i: softmax(scale q_i K^T) V */
void short_attention(const void *arguments, int64_t first, int64_t last) {
    const struct short_attention a = *(const struct short_attention *)arguments;
    int64_t key_heads = a.heads / a.shared, width = a.heads * a.size, most = whole_vectors(a.longest);
    float *keys = room(most * (a.size + ROWS)), *weights = keys + most * a.size;
    for (int64_t item = first; item < last; item++) {
        int64_t start = a.starts[item / key_heads], length = a.starts[item / key_heads + 1] - start;
        int64_t head = item % key_heads, padded = whole_vectors(length);
        const float *v = a.v + start * a.v_stride + head * a.size;
        transpose(a.k + start * a.k_stride + head * a.size, a.k_stride, length, padded, a.size, keys);
        for (int64_t h = head * a.shared; h < (head + 1) * a.shared; h++)
            for (int64_t i = 0; i < length; i += ROWS) {
                int64_t count = length - i < ROWS ? length - i : ROWS;
                int64_t end = weigh(&a, a.q + start * a.q_stride + h * a.size, i, count, keys, length, padded, weights);
                float *out = a.out + (start + i) * width + h * a.size;
                struct multiply mixed = {out, width, weights, padded, 1, v, a.v_stride, 0, end, a.size, 0};
                multiply(mixed, count);
            }
    }
    free(keys);
}

/* With P the softmax, computed again: dV = P^T dO, dP = dO V^T, dS = scale P (dP - sum(P dP)), dQ = dS K, dK = dS^T Q */
void short_attention_backward(const void *arguments, int64_t first, int64_t last) {
    const struct short_attention a = *(const struct short_attention *)arguments;
    int64_t key_heads = a.heads / a.shared, width = a.heads * a.size, key_width = key_heads * a.size;
    int64_t most = whole_vectors(a.longest);
    float *keys = room(2 * most * (a.size + most)), *values = keys + most * a.size;
    float *weights = values + most * a.size, *slopes = weights + most * most;
    for (int64_t item = first; item < last; item++) {
        int64_t start = a.starts[item / key_heads], length = a.starts[item / key_heads + 1] - start;
        int64_t head = item % key_heads, padded = whole_vectors(length);
        const float *k = a.k + start * a.k_stride + head * a.size, *v = a.v + start * a.v_stride + head * a.size;
        transpose(k, a.k_stride, length, padded, a.size, keys);
        transpose(v, a.v_stride, length, padded, a.size, values);
        for (int64_t h = head * a.shared; h < (head + 1) * a.shared; h++) {
            const float *q = a.q + start * a.q_stride + h * a.size, *grad = a.grad + start * width + h * a.size;
            for (int64_t i = 0; i < length; i += ROWS) {
                int64_t count = length - i < ROWS ? length - i : ROWS;
                float *p = weights + i * padded, *s = slopes + i * padded;
                int64_t end = weigh(&a, q, i, count, keys, length, padded, p);
                struct multiply of_weights = {
                    s, padded, grad + i * width, width, 1, values, padded, 0, a.size, whole_vectors(end), 0};
                multiply(of_weights, count);
                for (int64_t r = 0; r < count; r++) {
                    float *p_row = p + r * padded, *s_row = s + r * padded, along = 0.0f;
#pragma omp simd reduction(+ : along)
                    for (int64_t j = 0; j < end; j++) along += p_row[j] * s_row[j];
#pragma omp simd
                    for (int64_t j = 0; j < end; j++) s_row[j] = (float)a.scale * p_row[j] * (s_row[j] - along);
                }
                float *grad_q = a.grad_q + (start + i) * width + h * a.size;
                struct multiply of_q = {grad_q, width, s, padded, 1, k, a.k_stride, 0, end, a.size, 0};
                multiply(of_q, count);
            }
            int onto = h > head * a.shared;
            for (int64_t j = 0; j < length; j += ROWS) {
                int64_t count = length - j < ROWS ? length - j : ROWS;
                /* queries before j do not look at it; of its own four, those that do not have zeros there */
                int64_t from = a.causal ? j : 0, place = (start + j) * key_width + head * a.size;
                struct multiply of_v = {
                    a.grad_v + place, key_width, weights + j, 1, padded, grad, width, from, length, a.size, onto};
                struct multiply of_k = {
                    a.grad_k + place, key_width, slopes + j, 1, padded, q, a.q_stride, from, length, a.size, onto};
                multiply(of_v, count);
                multiply(of_k, count);
            }
        }
    }
    free(keys);
}
