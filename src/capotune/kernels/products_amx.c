/* Products of fp32 matrices by AMX, which Intel's processors have since Sapphire Rapids. It multiplies bf16 and adds up in
 * fp32. So each value is taken as the sum of two of bf16, x = h + l, and
 *
 *     x w = h h' + h l' + l h'
 *
 * which keeps 16 bits of each, as PyTorch's float32_matmul_precision "high". linear.py says where it is used.
 *
 * A tile is 16 rows of 64 bytes. A strip is 16 rows or columns of a matrix along the whole sum: tiles of 32 terms, h and l
 * in turn. There are two kinds, for the two factors, and left x right gives 16 x 16 sums:
 *
 *     left    [16 rows][32 terms]
 *     right   [16 pairs of terms][16 columns][2 terms of the pair]
 *
 * Activations become strips once. Weights do so panel by panel, just before use, and no second copy of a model is made. */
#include "amx.h"

enum { TERMS = 32, PAIR = 2 * SIDE, TILE = SIDE * TERMS, MOST_TOGETHER = 4, CACHED = 131072, PREFETCHED = 8, ROWS_FOR_ONE = 128,
       OUT_AT_ONCE = 1536 };
typedef uint16_t bf16;

/* Linux gives a process AMX's registers when it asks. 0: this processor or system has none. */
int64_t ask_for_amx(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18, AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24, AMX_INT8 = 1 << 25 };
    enum { AMX = AMX_BF16 | AMX_TILE | AMX_INT8, AVX512_BF16 = 1 << 5 };
    unsigned a, b, c, d, more;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !__get_cpuid_count(7, 1, &more, &b, &c, &a)) return 0;
    if ((d & AMX) != AMX || !(more & AVX512_BF16)) return 0;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
}

/* ------------------------------------------------------------------------------------------------------ into strips */

struct halves { __m512i h, l; };

INLINE __m512i rounded(__m512i x) {  /* to bf16, whose bits are the upper half */
    return _mm512_and_si512(_mm512_add_epi32(x, _mm512_set1_epi32(0x8000)), _mm512_set1_epi32((int)0xffff0000));
}

INLINE __m512i upper_halves(__m512i a, __m512i b) {
    const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21,
                                         19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutex2var_epi16(a, odd, b);
}

/* 32 values, a before b, as h and l */
INLINE struct halves split(__m512 a, __m512 b) {
    __m512i ha = rounded((__m512i)a), hb = rounded((__m512i)b);
    __m512 la = _mm512_sub_ps(a, (__m512)ha), lb = _mm512_sub_ps(b, (__m512)hb);
    return (struct halves){upper_halves(ha, hb), (__m512i)_mm512_cvtne2ps_pbh(lb, la)};
}

/* 16 values of one term and 16 of the next: each beside its neighbour */
INLINE __m512i interleaved(__m512i terms) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
                                           4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, terms);
}

INLINE struct halves split_row(const float *x, int64_t count) {
    if (count >= TERMS) return split(_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16));
    return split(_mm512_maskz_loadu_ps(first_of(count), x), _mm512_maskz_loadu_ps(first_of(count - 16), x + 16));
}

INLINE void store_tile(bf16 *to, const __m512i rows[SIDE]) {
    for (int i = 0; i < SIDE; i++) _mm512_store_si512(to + i * TERMS, rows[i]);
}

/* One strip of rows of x (rows, terms), x_stride apart */
static void left_strip(const float *x, int64_t x_stride, int64_t rows, int64_t terms, bf16 *to) {
    for (int64_t start = 0; start < terms; start += TERMS, to += 2 * TILE)
        for (int i = 0; i < SIDE; i++) {
            struct halves both = split_row(x + (i < rows ? i : 0) * x_stride + start, i < rows ? terms - start : 0);
            _mm512_store_si512(to + i * TERMS, both.h);
            _mm512_store_si512(to + TILE + i * TERMS, both.l);
        }
}

/* One strip of rows of x^T, which are columns of x (terms, rows) */
static void left_strip_across(const float *x, int64_t x_stride, int64_t rows, int64_t terms, bf16 *to) {
    __mmask16 mask = first_of(rows);
    for (int64_t start = 0; start < terms; start += TERMS, to += 2 * TILE) {
        __m512i h[SIDE], l[SIDE];  /* of pairs of terms, then of rows */
        for (int i = 0; i < SIDE; i++) {
            int64_t term = start + 2 * i;
            __m512 even = _mm512_maskz_loadu_ps(term < terms ? mask : 0, x + term * x_stride);
            __m512 odd = _mm512_maskz_loadu_ps(term + 1 < terms ? mask : 0, x + (term + 1) * x_stride);
            struct halves both = split(even, odd);
            h[i] = interleaved(both.h);
            l[i] = interleaved(both.l);
        }
        transpose(h);
        transpose(l);
        store_tile(to, h);
        store_tile(to + TILE, l);
    }
}

/* One strip of columns of x^T, which are rows of x (columns, terms) */
static void right_strip_across(const float *x, int64_t x_stride, int64_t columns, int64_t terms, bf16 *to) {
    for (int64_t start = 0; start < terms; start += TERMS, to += 2 * TILE) {
        __m512i h[SIDE], l[SIDE];
        for (int i = 0; i < SIDE; i++) {
            struct halves both = split_row(x + (i < columns ? i : 0) * x_stride + start, i < columns ? terms - start : 0);
            h[i] = both.h;
            l[i] = both.l;
        }
        transpose(h);
        transpose(l);
        store_tile(to, h);
        store_tile(to + TILE, l);
    }
}

/* Strips, so many bf16 values apart, of all columns of x (terms, columns): a row of x at a time, as it lies in memory */
static void right_strips(const float *x, int64_t x_stride, int64_t columns, int64_t terms, bf16 *to, int64_t apart) {
    for (int64_t term = 0; term < parts(terms, TERMS) * TERMS; term += 2) {
        const float *row = x + term * x_stride;
        bf16 *pair = to + term / TERMS * 2 * TILE + term % TERMS / 2 * TERMS;
        for (int64_t column = 0; column < columns; column += SIDE, pair += apart) {
            __builtin_prefetch(row + PREFETCHED * x_stride + column); /* a processor sees streams in rows, not from row to row */
            __builtin_prefetch(row + (PREFETCHED + 1) * x_stride + column);
            __mmask16 mask = first_of(columns - column);
            __m512 even = _mm512_maskz_loadu_ps(term < terms ? mask : 0, row + column);
            __m512 odd = _mm512_maskz_loadu_ps(term + 1 < terms ? mask : 0, row + x_stride + column);
            struct halves both = split(even, odd);
            _mm512_store_si512(pair, interleaved(both.h));
            _mm512_store_si512(pair + TILE, interleaved(both.l));
        }
    }
}

/* ------------------------------------------------------------------------------------------------------ strip x strip */

/* sums = left strips x right strips over so many tiles; sums are tiles [left][right], a strip's tiles follow each other */
#define MULTIPLY(name, lefts, rights)                                                                                          \
    static void name(const bf16 *l0, const bf16 *l1, const bf16 *r0, const bf16 *r1, int64_t tiles, float *sums) {            \
        EACH(lefts, rights, ZERO_SUM)                                                                                          \
        for (int64_t i = 0; i < tiles; i++, l0 += 2 * TILE, l1 += 2 * TILE, r0 += 2 * TILE, r1 += 2 * TILE) {                  \
            _tile_loadd(4, l0 + TILE, 64);                                                                                     \
            _tile_loadd(6, r0, 64);                                                                                            \
            if (lefts == 2) _tile_loadd(5, l1 + TILE, 64);                                                                     \
            if (rights == 2) _tile_loadd(7, r1, 64);                                                                           \
            EACH(lefts, rights, ADD)                                                                                           \
            _tile_loadd(4, l0, 64);                                                                                            \
            if (lefts == 2) _tile_loadd(5, l1, 64);                                                                            \
            EACH(lefts, rights, ADD)                                                                                           \
            _tile_loadd(6, r0 + TILE, 64);                                                                                     \
            if (rights == 2) _tile_loadd(7, r1 + TILE, 64);                                                                    \
            EACH(lefts, rights, ADD)                                                                                           \
            if (i % AWAKE == AWAKE - 1) _tile_stored(6, unread, 64);                                                           \
        }                                                                                                                      \
        EACH(lefts, rights, STORE_SUM)                                                                                         \
    }
#define EACH(lefts, rights, what) \
    what(0, 4, 6) if (rights == 2) { what(1, 4, 7) } if (lefts == 2) { what(2, 5, 6) } if (lefts == 2 && rights == 2) { what(3, 5, 7) }
#define ZERO_SUM(sum, left, right) _tile_zero(sum);
#define STORE_SUM(sum, left, right) _tile_stored(sum, sums + sum * SIDE * SIDE, 64);
#define ADD(sum, left, right) _tile_dpbf16ps(sum, left, right);
MULTIPLY(multiply_2_2, 2, 2)
MULTIPLY(multiply_2_1, 2, 1)
MULTIPLY(multiply_1_2, 1, 2)
MULTIPLY(multiply_1_1, 1, 1)

static void multiply(const bf16 *left, int64_t left_strip, int lefts, const bf16 *right, int64_t right_strip, int rights,
                     int64_t tiles, float *sums) {
    const bf16 *l1 = left + left_strip, *r1 = right + right_strip;
    if (lefts == 2 && rights == 2) multiply_2_2(left, l1, right, r1, tiles, sums);
    else if (lefts == 2) multiply_2_1(left, l1, right, r1, tiles, sums);
    else if (rights == 2) multiply_1_2(left, l1, right, r1, tiles, sums);
    else multiply_1_1(left, l1, right, r1, tiles, sums);
}

/* ------------------------------------------------------------------------------------------------ x W^T, g W and g^T x */

/* y = 16 x 16 sums + bias, or y += sums; across: the rows of the sums are y's columns */
INLINE void write_sums(const struct linear *a, const float *sums, int64_t row, int64_t column, int64_t columns, int across) {
    int64_t rows = least(SIDE, a->rows - row);
    __mmask16 mask = first_of(columns - column);
    __m512 more = a->bias ? _mm512_maskz_loadu_ps(mask, a->bias + column) : _mm512_setzero_ps();
    __m512i r[SIDE];
    for (int i = 0; i < SIDE; i++) r[i] = _mm512_load_si512(sums + i * SIDE);
    if (across) transpose(r);
    for (int i = 0; i < SIDE; i++) {
        if (i >= rows) break;
        float *y = a->y + (row + i) * a->y_stride + column;
        __m512 sum = _mm512_add_ps((__m512)r[i], a->accumulate ? _mm512_maskz_loadu_ps(mask, y) : more);
        _mm512_mask_storeu_ps(y, mask, sum);
    }
}

INLINE int64_t terms_of(const struct linear *a, int across) { return across ? a->in_features : a->out_features; }
INLINE int64_t columns_of(const struct linear *a, int across) { return across ? a->out_features : a->in_features; }

/* Strips of W for so many columns of y from the column left on */
INLINE void split_weight(const struct linear *a, int across, int64_t left, int64_t count, bf16 *to) {
    int64_t terms = terms_of(a, across), size = parts(terms, TERMS) * 2 * TILE;
    if (!across) right_strips(a->weight + left, a->weight_stride, count, terms, to, size);
    else for (int64_t column = 0; column < count; column += SIDE, to += size)
        left_strip(a->weight + (left + column) * a->weight_stride, a->weight_stride, least(SIDE, count - column), terms, to);
}

/* Panels are 32 columns of y. A few of them at a time have their weights made into strips, which the second-level cache holds;
 * then two strips of activations after the other are multiplied by them all. */
INLINE void run_panels(const struct linear *a, int across, int64_t first, int64_t last) {
    int64_t terms = terms_of(a, across), columns = columns_of(a, across), size = parts(terms, TERMS) * 2 * TILE;
    int64_t together = most(1, least(MOST_TOGETHER, CACHED / (PAIR * terms))), tiles = parts(terms, TERMS);
    bf16 *weights = workspace(together * 2 * size * sizeof(bf16));
    float sums[MOST_TOGETHER * PAIR * PAIR] __attribute__((aligned(64)));
    configure();
    for (int64_t panel = first; panel < last; panel += together) {
        int64_t left = panel * PAIR, strips = parts(least(together * PAIR, columns - left), SIDE);
        strips = least(strips, (last - panel) * 2);
        split_weight(a, across, left, least(strips * SIDE, columns - left), weights);
        for (int64_t row = 0; row < a->rows; row += PAIR) {
            const bf16 *rows = a->strips + row / SIDE * size;
            int row_strips = a->rows - row > SIDE ? 2 : 1;
            for (int64_t s = 0; s < strips; s += 2) {
                int column_strips = strips - s > 1 ? 2 : 1;
                float *sum = sums + s * SIDE * PAIR;
                if (across) multiply(weights + s * size, size, column_strips, rows, size, row_strips, tiles, sum);
                else multiply(rows, size, row_strips, weights + s * size, size, column_strips, tiles, sum);
            }
            for (int r = 0; r < row_strips; r++)
                for (int64_t s = 0; s < strips; s++)
                    write_sums(a, sums + (s / 2 * 4 + (across ? s % 2 * 2 + r : r * 2 + s % 2)) * SIDE * SIDE, row + r * SIDE,
                               left + s * SIDE, columns, across);
        }
    }
    _tile_release();
    free(weights);
}

/* ------------------------------------------------------------------------------------------------------------ threads */

/* across: y = x W^T + bias, W's rows are the left strips, x's the right ones; else y (+)= g W, g's rows are the left strips,
 * W's columns the right ones; transposed: g lies in memory as (out, rows) */
struct work {
    const struct linear *product;
    int across, transposed;
    int64_t strips;  /* of the activations in one part */
};

static void make_strips(const void *arguments, int64_t first, int64_t last) {
    const struct work work = *(const struct work *)arguments;
    const struct linear *a = work.product;
    int64_t terms = terms_of(a, work.across), size = parts(terms, TERMS) * 2 * TILE;
    void (*make)(const float *, int64_t, int64_t, int64_t, bf16 *) =
        work.across ? right_strip_across : work.transposed ? left_strip_across : left_strip;
    for (int64_t strip = first; strip < last; strip++) {
        int64_t rows = least(SIDE, a->rows - strip * SIDE);
        const float *x = a->x + strip * SIDE * (work.transposed ? 1 : a->x_stride);
        make(x, a->x_stride, rows, terms, a->strips + strip * size);
    }
}

static void make_panels(const void *arguments, int64_t first, int64_t last) {
    const struct work work = *(const struct work *)arguments;
    /* two calls, so that the compiler makes code for each way, without asking inside the loops */
    if (work.across) run_panels(work.product, 1, first, last);
    else run_panels(work.product, 0, first, last);
}

/* A part of the strips with all panels: made and used by the same thread */
static void make_part(const void *arguments, int64_t first, int64_t last) {
    const struct work work = *(const struct work *)arguments;
    const struct linear *a = work.product;
    int64_t all = parts(a->rows, SIDE), size = parts(terms_of(a, work.across), TERMS) * 2 * TILE;
    for (int64_t from = first * work.strips; from < least(last * work.strips, all); from += work.strips) {
        int64_t to = least(from + work.strips, all);
        if (!a->strips_ready) make_strips(&work, from, to);
        struct linear own = *a;
        own.rows = least(to * SIDE, a->rows) - from * SIDE;
        own.y += from * SIDE * own.y_stride;
        own.strips += from * size;
        struct work of_own = {&own, work.across, 0, 0};
        make_panels(&of_own, 0, parts(columns_of(&own, work.across), PAIR));
    }
}

/* Many rows are shared out by rows, so that every thread reads all weights, and few by panels. */
static void run_product(const struct linear *a, int across, int transposed, sharer *share, void *fork_join, int64_t threads) {
    int64_t strips = parts(a->rows, SIDE), panels = parts(columns_of(a, across), PAIR), used = share ? threads : 1;
    struct work work = {a, across, transposed, 0};
    if (a->rows >= used * ROWS_FOR_ONE) {
        work.strips = parts(parts(strips, used), 2) * 2;
        share_out(make_part, &work, parts(strips, work.strips), share, fork_join, threads);
        return;
    }
    if (!a->strips_ready) share_out(make_strips, &work, strips, share, fork_join, threads);
    share_out(make_panels, &work, panels, share, fork_join, threads);
}

void linear(const void *arguments, sharer *share, void *fork_join, int64_t threads) {
    const struct linear *a = arguments;
    run_product(a, 1, 0, share, fork_join, threads);
}

/* y (+)= g W for the outputs [from, to), the strips of g made of a part of them at a time */
static void add_outputs(struct linear a, int64_t from, int64_t to, sharer *share, void *fork_join, int64_t threads) {
    const float *g = a.x, *weight = a.weight;
    bf16 *strips = a.strips = workspace(parts(a.rows, SIDE) * SIDE * OUT_AT_ONCE * 2 * sizeof(bf16));
    for (int64_t start = from; start < to; start += OUT_AT_ONCE, a.accumulate = 1) {
        a.out_features = least(OUT_AT_ONCE, to - start);
        a.x = g + start;
        a.weight = weight + start * a.weight_stride;
        run_product(&a, 0, 0, share, fork_join, threads);
    }
    free(strips);
}

/* Every thread takes a share of the outputs, and its sums have a place of their own: so weights become strips once */
struct shares {
    const struct linear *product;
    int64_t count;
    float *places;  /* (count - 1, rows, into): the first one's is y */
};

static void sum_shares(const void *arguments, int64_t first, int64_t last) {
    const struct shares shares = *(const struct shares *)arguments;
    const struct linear *a = shares.product;
    int64_t length = parts(parts(a->out_features, shares.count), TERMS) * TERMS;
    for (int64_t share = first; share < last; share++) {
        int64_t from = least(share * length, a->out_features), to = least(from + length, a->out_features);
        struct linear own = *a;
        if (share) {
            own.y = shares.places + (share - 1) * a->rows * a->in_features;
            own.y_stride = a->in_features;
            own.accumulate = 0;
            if (from == to) memset(own.y, 0, a->rows * a->in_features * sizeof(float));
        }
        add_outputs(own, from, to, NULL, NULL, 1);
    }
}

static void add_shares(const void *arguments, int64_t first, int64_t last) {
    const struct shares shares = *(const struct shares *)arguments;
    const struct linear *a = shares.product;
    for (int64_t share = 1; share < shares.count; share++)
        for (int64_t row = first; row < last; row++) {
            const float *found = shares.places + ((share - 1) * a->rows + row) * a->in_features;
            for (int64_t i = 0; i < a->in_features; i++) a->y[row * a->y_stride + i] += found[i];
        }
}

void linear_input_gradient(const void *arguments, sharer *share, void *fork_join, int64_t threads) {
    const struct linear *a = arguments;
    if (a->strips) run_product(a, 0, 0, share, fork_join, threads);
    else if (!share || threads == 1 || parts(a->out_features, OUT_AT_ONCE) < threads)
        add_outputs(*a, 0, a->out_features, share, fork_join, threads);
    else {
        struct shares shares = {a, threads, workspace((threads - 1) * a->rows * a->in_features * sizeof(float))};
        share(fork_join, sum_shares, &shares, threads, threads);
        share(fork_join, add_shares, &shares, a->rows, least(threads, a->rows));
        free(shares.places);
    }
}

/* y (+)= g^T x for g (tokens, out) and x (tokens, into): that is g^T W with x as W */
void linear_weight_gradient(const void *arguments, sharer *share, void *fork_join, int64_t threads) {
    const struct linear *a = arguments;
    run_product(a, 0, 1, share, fork_join, threads);
}
