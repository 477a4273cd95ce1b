/* Products of fp32 activations with a frozen weight that is prepacked in 16 bits, by AMX in whole numbers: y = x W^T for W
 * (columns, terms), with a LoRA delta, a bias and an activation of x while its rows are at hand.
 *
 * Each row of x, and each of W, is whole numbers q from -32,639 to 32,639 times a scale, the largest in that row / 32,639.
 * Each q is two of 8 bits, q = 256 h + l, and
 *
 *     q q' = 65,536 h h' + 256 (h l' + l h')
 *
 * where l l' is left out: 16 bits of each row's largest value count. AMX multiplies twice as many values of 8 bits
 * as of bf16, and they are half as long: products_amx.c's way of keeping 16 bits takes twice the time and memory. Sums of
 * h h' stay below 2^31 for up to 133,000 terms, those of the others for 66,000.
 *
 * A strip is 16 rows along the whole sum, and then their 16 scales: tiles of 64 terms, h and l in turn. There are two
 * kinds, for the two factors, and activations x weight gives 16 x 16 sums:
 *
 *     activations  [16 rows][64 terms]
 *     weight       [16 x 4 terms][16 columns][4 terms]
 *
 * Of 64 terms the order is the same in both, and not that in memory. */
#include "amx.h"

enum { TERMS = 64, PAIR = 2 * SIDE, TILE = SIDE * TERMS, LINE = 64, ROWS_FOR_ONE = 128, HELD = 1 << 20, LARGEST = 32639 };

INLINE int64_t tiles_of(int64_t terms) { return parts(terms, TERMS); }
INLINE int64_t strip_bytes(int64_t terms) { return tiles_of(terms) * 2 * TILE + SIDE * sizeof(float); }
INLINE const float *scales_of(const int8_t *strip, int64_t terms) {
    return (const float *)(strip + tiles_of(terms) * 2 * TILE);
}

/* ------------------------------------------------------------------------------------------------------ into strips */

/* The largest magnitude / LARGEST. Rows of values below 1e-30 are 0, and NaN where one is not finite. */
INLINE float scale_of(const float *x, int64_t terms) {
    __m512i most = _mm512_setzero_si512(), magnitude = _mm512_set1_epi32(0x7fffffff);
    for (int64_t start = 0; start < terms; start += 16) {
        __m512i bits = _mm512_maskz_loadu_epi32(first_of(terms - start), x + start);
        most = _mm512_max_epu32(most, _mm512_and_si512(bits, magnitude));
    }
    union { uint32_t bits; float value; } largest = {_mm512_reduce_max_epu32(most)};
    if (largest.bits >= 0x7f800000) return __builtin_nanf("");
    return largest.value < 1e-30f ? 0 : largest.value / LARGEST;
}

struct halves { __m512i h, l; };

INLINE __m512i whole(const float *x, int64_t count, __m512 inverse) {
    return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(first_of(count), x), inverse));
}

/* 64 values in that order which packing leaves them in */
INLINE struct halves split(const float *x, int64_t count, __m512 inverse) {
    __m512i q0 = _mm512_packs_epi32(whole(x, count, inverse), whole(x + 16, count - 16, inverse));
    __m512i q1 = _mm512_packs_epi32(whole(x + 32, count - 32, inverse), whole(x + 48, count - 48, inverse));
    __m512i half = _mm512_set1_epi16(128), low = _mm512_set1_epi16(255);
    __m512i h0 = _mm512_srai_epi16(_mm512_add_epi16(q0, half), 8), h1 = _mm512_srai_epi16(_mm512_add_epi16(q1, half), 8);
    return (struct halves){_mm512_packs_epi16(h0, h1),
                           _mm512_packus_epi16(_mm512_and_si512(q0, low), _mm512_and_si512(q1, low))};
}

/* One strip of rows of x (rows, terms), x_stride apart; transposed: as the weight's strips are */
INLINE void make_strip(const float *x, int64_t x_stride, int64_t rows, int64_t terms, int8_t *to, int transposed) {
    float scales[SIDE] = {0}, inverses[SIDE] = {0};
    for (int i = 0; i < rows; i++) {
        scales[i] = scale_of(x + i * x_stride, terms);
        inverses[i] = scales[i] > 0 ? 1 / scales[i] : 0;
    }
    for (int64_t start = 0; start < terms; start += TERMS, to += 2 * TILE) {
        __m512i h[SIDE], l[SIDE];
        for (int i = 0; i < SIDE; i++) {
            struct halves both = split(x + (i < rows ? i : 0) * x_stride + start, terms - start, _mm512_set1_ps(inverses[i]));
            h[i] = both.h;
            l[i] = both.l;
        }
        if (transposed) transpose(h);
        if (transposed) transpose(l);
        for (int i = 0; i < SIDE; i++) {
            _mm512_store_si512(to + i * LINE, h[i]);
            _mm512_store_si512(to + TILE + i * LINE, l[i]);
        }
    }
    memcpy(to, scales, sizeof scales);
}

void prepack_int16(const void *arguments, int64_t first, int64_t last) {
    const struct prepack_int16 a = *(const struct prepack_int16 *)arguments;
    for (int64_t strip = first; strip < last; strip++) {
        const float *weight = a.weight + strip * SIDE * a.weight_stride;
        int64_t columns = least(SIDE, a.columns - strip * SIDE);
        make_strip(weight, a.weight_stride, columns, a.terms, a.strips + strip * strip_bytes(a.terms), 1);
    }
}

/* ------------------------------------------------------------------------------------------------------ strip x strip */

/* What is prefetched into the second-level cache beside the work: so many lines with each tile of h and l */
struct prefetch { const int8_t *from; int64_t lines; };

/* Sums of h h' in tiles 0 and 1, of h l' + l h' in 2 and 3, for one strip of activations or two, by one of the weight */
INLINE void multiply(const int8_t *l0, const int8_t *l1, int lefts, const int8_t *right, int64_t tiles, int32_t *sums,
                     struct prefetch prefetch) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < tiles; i++, l0 += 2 * TILE, l1 += 2 * TILE, right += 2 * TILE) {
        for (int64_t line = 0; line < prefetch.lines; line++, prefetch.from += LINE) __builtin_prefetch(prefetch.from, 0, 2);
        _tile_loadd(4, right, LINE);
        _tile_loadd(6, l0, LINE);
        _tile_dpbssd(0, 6, 4);
        if (lefts == 2) _tile_loadd(7, l1, LINE);
        if (lefts == 2) _tile_dpbssd(1, 7, 4);
        _tile_loadd(5, right + TILE, LINE);
        _tile_dpbssd(2, 6, 5);
        if (lefts == 2) _tile_dpbssd(3, 7, 5);
        _tile_loadd(6, l0 + TILE, LINE);
        _tile_dpbssd(2, 6, 4);
        if (lefts == 2) _tile_loadd(7, l1 + TILE, LINE);
        if (lefts == 2) _tile_dpbssd(3, 7, 4);
        if (i % AWAKE == AWAKE - 1) _tile_stored(6, unread, LINE);
    }
    _tile_stored(0, sums, LINE);
    _tile_stored(2, sums + 2 * SIDE * SIDE, LINE);
    if (lefts == 2) _tile_stored(1, sums + SIDE * SIDE, LINE);
    if (lefts == 2) _tile_stored(3, sums + 3 * SIDE * SIDE, LINE);
}

/* ------------------------------------------------------------------------------------------------------------ a product */

/* projected_xa of so many rows, from as many of f(x) */
static void project(const struct prepacked_product_int16 *a, const float *from, int64_t row, int64_t rows) {
    enum { TOGETHER = 4 };
    for (int64_t r = 0; r < rows; r += TOGETHER)
        for (int64_t k = 0; k < a->projected_ranks; k += TOGETHER) {
            const float *x[TOGETHER], *matrix[TOGETHER];
            for (int i = 0; i < TOGETHER; i++) {
                x[i] = from + least(r + i, rows - 1) * a->x_stride;
                matrix[i] = a->projected_matrix + least(k + i, a->projected_ranks - 1) * a->terms;
            }
            __m512 sums[SIDE];
            for (int i = 0; i < SIDE; i++) sums[i] = _mm512_setzero_ps();
            for (int64_t start = 0; start < a->terms; start += SIDE) {
                __mmask16 mask = first_of(a->terms - start);
                __m512 along[TOGETHER];
                for (int j = 0; j < TOGETHER; j++) along[j] = _mm512_maskz_loadu_ps(mask, matrix[j] + start);
                for (int i = 0; i < TOGETHER; i++) {
                    __m512 values = _mm512_maskz_loadu_ps(mask, x[i] + start);
                    for (int j = 0; j < TOGETHER; j++)
                        sums[TOGETHER * i + j] = _mm512_fmadd_ps(values, along[j], sums[TOGETHER * i + j]);
                }
            }
            transpose((__m512i *)sums);
            for (int i = 1; i < SIDE; i++) sums[0] = _mm512_add_ps(sums[0], sums[i]);
            float found[SIDE];
            _mm512_storeu_ps(found, _mm512_mul_ps(sums[0], _mm512_set1_ps((float)a->projected_scale)));
            for (int64_t i = 0; i < least(TOGETHER, rows - r); i++)
                for (int64_t j = 0; j < least(TOGETHER, a->projected_ranks - k); j++)
                    a->projected_xa[(row + r + i) * a->xa_stride + k + j] = found[TOGETHER * i + j];
        }
}

/* sums += delta_scale delta_xa delta_matrix, in fp32: 16 rows, of which so many are, by the 16 columns from column on */
INLINE void add_delta(const struct prepacked_product_int16 *a, __m512 r[SIDE], int64_t row, int64_t rows, int64_t column,
                      __mmask16 mask) {
    const float *xa = a->delta_xa + row * a->xa_stride;
    __m512 scale = _mm512_set1_ps((float)a->delta_scale);
    for (int64_t k = 0; k < a->delta_ranks; k++, xa++) {
        __m512 direction = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, a->delta_matrix + k * a->columns + column));
        if (rows == SIDE) /* apart, so that all sums stay in registers */
            for (int i = 0; i < SIDE; i++)
                r[i] = _mm512_fmadd_ps(_mm512_set1_ps(xa[i * a->xa_stride]), direction, r[i]);
        else
            for (int i = 0; i < SIDE; i++)
                if (i < rows) r[i] = _mm512_fmadd_ps(_mm512_set1_ps(xa[i * a->xa_stride]), direction, r[i]);
    }
}

/* y (+)= the product's 16 rows by 16 columns from their sums, with bias and delta */
INLINE void write_sums(const struct prepacked_product_int16 *a, const int32_t *sums, const float *row_scales,
                       const float *column_scales, int64_t row, int64_t column) {
    int64_t rows = least(SIDE, a->rows - row);
    __mmask16 mask = first_of(a->columns - column);
    __m512 more = a->bias ? _mm512_maskz_loadu_ps(mask, a->bias + column) : _mm512_setzero_ps();
    __m512 r[SIDE], high = _mm512_set1_ps(256), by_column = _mm512_mul_ps(high, _mm512_loadu_ps(column_scales));
    for (int i = 0; i < SIDE; i++) {
        __m512 coarse = _mm512_cvtepi32_ps(_mm512_load_si512(sums + i * SIDE));
        __m512 fine = _mm512_cvtepi32_ps(_mm512_load_si512(sums + (2 * SIDE + i) * SIDE));
        r[i] = _mm512_mul_ps(_mm512_mul_ps(_mm512_fmadd_ps(coarse, high, fine), by_column), _mm512_set1_ps(row_scales[i]));
    }
    if (a->delta_ranks) add_delta(a, r, row, rows, column, mask);
    for (int i = 0; i < SIDE; i++) {
        if (i >= rows) break;
        float *y = a->y + (row + i) * a->y_stride + column;
        _mm512_mask_storeu_ps(y, mask, _mm512_add_ps(r[i], a->accumulate ? _mm512_maskz_loadu_ps(mask, y) : more));
    }
}

struct work {
    const struct prepacked_product_int16 *product;
    int64_t strips;  /* of the activations in one part, where they are shared out by parts */
};

/* The lines of y that two strips of activations give with one of the weight: prefetched while they are computed */
INLINE void prefetch_lines(const struct prepacked_product_int16 *a, int64_t row, int64_t column) {
    for (int64_t r = row; r < least(row + PAIR, a->rows); r++) __builtin_prefetch(a->y + r * a->y_stride + column, 1);
}

/* Panels are 32 columns of y. Two strips of activations after the other are multiplied by both strips of a panel; meanwhile the
 * next panel is prefetched, a few of its lines with each tile. */
static void make_panels(const void *arguments, int64_t first, int64_t last) {
    const struct prepacked_product_int16 *a = ((const struct work *)arguments)->product;
    int64_t size = strip_bytes(a->terms), tiles = tiles_of(a->terms), pairs = parts(a->rows, PAIR), lines = parts(PAIR, pairs);
    int32_t sums[4 * SIDE * SIDE] __attribute__((aligned(64)));
    configure();
    for (int64_t panel = first; panel < last; panel++) {
        const int8_t *next = a->weight + (panel + 1) * 2 * size, *to = next + (panel + 1 < last ? 2 * size : 0);
        for (int64_t row = 0; row < a->rows; row += PAIR) {
            const int8_t *rows = a->strips + row / SIDE * size;
            int two = a->rows - row > SIDE;
            for (int64_t column = panel * PAIR; column < least((panel + 1) * PAIR, a->columns); column += SIDE) {
                const int8_t *weight = a->weight + column / SIDE * size;
                prefetch_lines(a, row, column);
                struct prefetch prefetch = {next, next < to ? lines : 0};
                if (two) multiply(rows, rows + size, 2, weight, tiles, sums, prefetch);
                else multiply(rows, rows, 1, weight, tiles, sums, prefetch);
                next += prefetch.lines * tiles * LINE;
                for (int strip = 0; strip <= two; strip++)
                    write_sums(a, sums + strip * SIDE * SIDE, scales_of(rows + strip * size, a->terms),
                               scales_of(weight, a->terms), row + strip * SIDE, column);
            }
        }
    }
    _tile_release();
}

static void make_strips(const void *arguments, int64_t first, int64_t last) {
    const struct prepacked_product_int16 *a = ((const struct work *)arguments)->product;
    float *own = a->activation ? workspace(SIDE * a->terms * sizeof(float)) : NULL;
    for (int64_t strip = first; strip < last; strip++) {
        int64_t rows = least(SIDE, a->rows - strip * SIDE);
        const float *x = a->x + strip * SIDE * a->x_stride;
        if (own) {
            struct elementwise of_x = {0, a->terms, x, own};
            a->activation(&of_x, 0, rows);
            x = own;
        }
        make_strip(x, a->x_stride, rows, a->terms, a->strips + strip * strip_bytes(a->terms), 0);
        if (a->projected_ranks) project(a, x, strip * SIDE, rows);
    }
    free(own);
}

/* ------------------------------------------------------------------------------------------------------------ threads */

/* A part of the strips with all panels: made and used by the same thread, and few enough to stay in its cache */
static void make_part(const void *arguments, int64_t first, int64_t last) {
    const struct work work = *(const struct work *)arguments;
    const struct prepacked_product_int16 *a = work.product;
    int64_t all = parts(a->rows, SIDE);
    for (int64_t from = first * work.strips; from < least(last * work.strips, all); from += work.strips) {
        int64_t to = least(from + work.strips, all);
        if (!a->strips_ready) make_strips(&work, from, to);
        struct prepacked_product_int16 own = *a;
        own.rows = least(to * SIDE, a->rows) - from * SIDE;
        own.y += from * SIDE * own.y_stride;
        own.delta_xa += from * SIDE * own.xa_stride;
        own.strips += from * strip_bytes(a->terms);
        struct work of_own = {&own, 0};
        make_panels(&of_own, 0, parts(own.columns, PAIR));
    }
}

/* Many rows are shared out by rows, and every thread reads the whole weight, anew for every part of its rows, at most HELD
 * elements: cheaper than reading those anew. Few rows are shared out by panels. share is share_rows of elementwise_cpu.c, or
 * none for one thread. */
void prepacked_product_int16(const void *arguments, sharer *share, void *fork_join, int64_t threads) {
    const struct prepacked_product_int16 *a = arguments;
    int64_t strips = parts(a->rows, SIDE), panels = parts(a->columns, PAIR), used = share ? threads : 1;
    struct work work = {a, 0};
    if (a->rows >= used * ROWS_FOR_ONE) {
        int64_t own = parts(strips, used), held = most(1, HELD / (PAIR * a->terms));
        work.strips = parts(parts(own, parts(own, held)), 2) * 2;
        share_out(make_part, &work, parts(strips, work.strips), share, fork_join, threads);
        return;
    }
    if (!a->strips_ready) share_out(make_strips, &work, strips, share, fork_join, threads);
    share_out(make_panels, &work, panels, share, fork_join, threads);
}
