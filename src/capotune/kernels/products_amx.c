/* Products of fp32 matrices by AMX, the matrix unit of Intel's processors since Sapphire Rapids. It multiplies bf16 and adds
 * up in fp32. So each number is taken as the sum of two of bf16, x = h + l, and
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
#define _GNU_SOURCE
#include <cpuid.h>
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define INLINE static inline __attribute__((always_inline))
enum { SIDE = 16, TERMS = 32, PAIR = 2 * SIDE, TILE = SIDE * TERMS, MOST_TOGETHER = 4, CACHED = 131072, AHEAD = 8,
       ROWS_FOR_ONE = 128, HELD = 1 << 20, OUT_AT_ONCE = 1536, PANEL_LINES = 2 * PAIR, AWAKE = 4 };
typedef uint16_t bf16;
typedef void kernel(const void *arguments, int64_t first, int64_t last);

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }
INLINE __mmask16 first_of(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1); }

/* Linux gives a process the unit's registers when it asks. 0: this processor or system has none. */
int64_t ask_for_amx(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18, AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24, AVX512_BF16 = 1 << 5 };
    unsigned a, b, c, d, more;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !__get_cpuid_count(7, 1, &more, &b, &c, &a)) return 0;
    if (!(d & AMX_BF16) || !(d & AMX_TILE) || !(more & AVX512_BF16)) return 0;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
}

static void configure(void) {
    struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {1, 0, {0}, {0}, {0}};
    for (int tile = 0; tile < 8; tile++) { config.bytes[tile] = 64; config.rows[tile] = SIDE; }
    _tile_loadconfig(&config);
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

/* 32 numbers, a before b, as h and l */
INLINE struct halves split(__m512 a, __m512 b) {
    __m512i ha = rounded((__m512i)a), hb = rounded((__m512i)b);
    __m512 la = _mm512_sub_ps(a, (__m512)ha), lb = _mm512_sub_ps(b, (__m512)hb);
    return (struct halves){upper_halves(ha, hb), (__m512i)_mm512_cvtne2ps_pbh(lb, la)};
}

/* 16 numbers of one term and 16 of the next: each beside its neighbour */
INLINE __m512i interleaved(__m512i terms) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
                                           4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, terms);
}

INLINE struct halves split_row(const float *x, int64_t count) {
    if (count >= TERMS) return split(_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16));
    return split(_mm512_maskz_loadu_ps(first_of(count), x), _mm512_maskz_loadu_ps(first_of(count - 16), x + 16));
}

/* 16 x 16 numbers of 4 bytes */
INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        int at = (i & 4) ? i + 0 : i;
        r[at] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[at + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
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

/* Strips, so many numbers of bf16 apart, of all columns of x (terms, columns): a row of x at a time, as it lies in memory */
static void right_strips(const float *x, int64_t x_stride, int64_t columns, int64_t terms, bf16 *to, int64_t apart) {
    for (int64_t term = 0; term < parts(terms, TERMS) * TERMS; term += 2) {
        const float *row = x + term * x_stride;
        bf16 *pair = to + term / TERMS * 2 * TILE + term % TERMS / 2 * TERMS;
        for (int64_t column = 0; column < columns; column += SIDE, pair += apart) {
            __builtin_prefetch(row + AHEAD * x_stride + column); /* a processor sees streams in rows, and not from row to row */
            __builtin_prefetch(row + (AHEAD + 1) * x_stride + column);
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

/* Never read. A tile store that comes 2,700 cycles after the last one, or later, costs 1,000 more (measured: the stores'
 * path falls asleep), and a long sum takes as many. So some tile is stored now and then meanwhile. */
static _Thread_local float unread[SIDE * SIDE] __attribute__((aligned(64)));

/* What is brought into the second-level cache beside the work: so many lines with each tile */
struct ahead { const bf16 *from; int64_t lines; };

/* sums = left strips x right strips over so many tiles; sums are tiles [left][right], a strip's tiles follow each other */
#define MULTIPLY(name, lefts, rights)                                                                                          \
    static void name(const bf16 *l0, const bf16 *l1, const bf16 *r0, const bf16 *r1, int64_t tiles, float *sums,               \
                     struct ahead ahead) {                                                                                     \
        EACH(lefts, rights, ZERO_SUM)                                                                                          \
        for (int64_t i = 0; i < tiles; i++, l0 += 2 * TILE, l1 += 2 * TILE, r0 += 2 * TILE, r1 += 2 * TILE) {                  \
            for (int64_t line = 0; line < ahead.lines; line++, ahead.from += TERMS) __builtin_prefetch(ahead.from, 0, 2);      \
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
                     int64_t tiles, float *sums, struct ahead ahead) {
    const bf16 *l1 = left + left_strip, *r1 = right + right_strip;
    if (lefts == 2 && rights == 2) multiply_2_2(left, l1, right, r1, tiles, sums, ahead);
    else if (lefts == 2) multiply_2_1(left, l1, right, r1, tiles, sums, ahead);
    else if (rights == 2) multiply_1_2(left, l1, right, r1, tiles, sums, ahead);
    else multiply_1_1(left, l1, right, r1, tiles, sums, ahead);
}

static void *room(int64_t bytes) {
    void *space = aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64);
    if (!space) abort();
    return space;
}

/* ------------------------------------------------------------------------------------------------ x W^T, g W and g^T x */

struct product {
    int64_t rows, out, into;  /* of the activations; W is (out, into) */
    const float *x;           /* (rows, into), or g (rows, out) */
    int64_t x_stride;
    const float *weight;
    int64_t weight_stride;
    const float *bias;        /* (out,) or none */
    float *y;                 /* (rows, out), or (rows, into) */
    int64_t y_stride, onto;   /* onto: added to what is there */
    bf16 *strips;             /* of the activations; none: see linear_input_gradient */
    int64_t ready;            /* whether they are in it */
    const bf16 *panels;       /* W's strips, as split_for_... makes them, or none */
    /* y += scale low matrix while y is at hand, for low (rows, ranks) and matrix (ranks, columns of y) */
    int64_t ranks;
    const float *low;
    int64_t low_stride;
    const float *matrix;
    double scale;
    /* made = made_scale x directions^T while x is, for made (rows, made_ranks), rows low_stride apart, and directions
     * (made_ranks, terms); low may be some of its columns */
    int64_t made_ranks;
    float *made;
    const float *directions;
    double made_scale;
    /* x is what this gives of the x above, row by row, or none; x has no gaps between its rows then */
    kernel *before;
};

/* The arguments of such kernels of elementwise_cpu.c, in fp32 */
struct elementwise { int64_t dtype, columns; const float *x; float *y; };

/* So many rows of made, which is said above, from as many of x */
static void project(const struct product *a, const float *from, int64_t x_stride, int64_t terms, int64_t row, int64_t rows) {
    enum { SOME = 4 };
    for (int64_t r = 0; r < rows; r += SOME)
        for (int64_t k = 0; k < a->made_ranks; k += SOME) {
            const float *x[SOME], *directions[SOME];
            for (int i = 0; i < SOME; i++) {
                x[i] = from + least(r + i, rows - 1) * x_stride;
                directions[i] = a->directions + least(k + i, a->made_ranks - 1) * terms;
            }
            __m512 sums[SIDE];
            for (int i = 0; i < SIDE; i++) sums[i] = _mm512_setzero_ps();
            for (int64_t start = 0; start < terms; start += SIDE) {
                __mmask16 mask = first_of(terms - start);
                __m512 along[SOME];
                for (int j = 0; j < SOME; j++) along[j] = _mm512_maskz_loadu_ps(mask, directions[j] + start);
                for (int i = 0; i < SOME; i++) {
                    __m512 numbers = _mm512_maskz_loadu_ps(mask, x[i] + start);
                    for (int j = 0; j < SOME; j++) sums[SOME * i + j] = _mm512_fmadd_ps(numbers, along[j], sums[SOME * i + j]);
                }
            }
            transpose((__m512i *)sums);
            for (int i = 1; i < SIDE; i++) sums[0] = _mm512_add_ps(sums[0], sums[i]);
            float found[SIDE];
            _mm512_storeu_ps(found, _mm512_mul_ps(sums[0], _mm512_set1_ps((float)a->made_scale)));
            for (int64_t i = 0; i < least(SOME, rows - r); i++)
                for (int64_t j = 0; j < least(SOME, a->made_ranks - k); j++)
                    a->made[(row + r + i) * a->low_stride + k + j] = found[SOME * i + j];
        }
}

/* sums += scale low matrix, in fp32: 16 rows, of which so many are, by the 16 columns from column on */
INLINE void add_change(const struct product *a, __m512i r[SIDE], int64_t row, int64_t rows, int64_t column, int64_t columns,
                       __mmask16 mask) {
    const float *low = a->low + row * a->low_stride;
    __m512 scale = _mm512_set1_ps((float)a->scale);
    for (int64_t k = 0; k < a->ranks; k++, low++) {
        __m512 direction = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, a->matrix + k * columns + column));
        if (rows == SIDE) /* apart, so that all sums stay in registers */
            for (int i = 0; i < SIDE; i++)
                r[i] = (__m512i)_mm512_fmadd_ps(_mm512_set1_ps(low[i * a->low_stride]), direction, (__m512)r[i]);
        else
            for (int i = 0; i < SIDE; i++)
                if (i < rows) r[i] = (__m512i)_mm512_fmadd_ps(_mm512_set1_ps(low[i * a->low_stride]), direction, (__m512)r[i]);
    }
}

/* y = 16 x 16 sums + bias, or y += sums; across: the rows of the sums are y's columns */
INLINE void write_sums(const struct product *a, const float *sums, int64_t row, int64_t column, int64_t columns, int across) {
    int64_t rows = least(SIDE, a->rows - row);
    __mmask16 mask = first_of(columns - column);
    __m512 more = a->bias ? _mm512_maskz_loadu_ps(mask, a->bias + column) : _mm512_setzero_ps();
    __m512i r[SIDE];
    for (int i = 0; i < SIDE; i++) r[i] = _mm512_load_si512(sums + i * SIDE);
    if (across) transpose(r);
    if (a->ranks) add_change(a, r, row, rows, column, columns, mask);
    for (int i = 0; i < SIDE; i++) {
        if (i >= rows) break;
        float *y = a->y + (row + i) * a->y_stride + column;
        __m512 sum = _mm512_add_ps((__m512)r[i], a->onto ? _mm512_maskz_loadu_ps(mask, y) : more);
        _mm512_mask_storeu_ps(y, mask, sum);
    }
}

INLINE int64_t terms_of(const struct product *a, int across) { return across ? a->into : a->out; }
INLINE int64_t columns_of(const struct product *a, int across) { return across ? a->out : a->into; }

/* Strips of W for so many columns of y from the column left on */
INLINE void split_weight(const struct product *a, int across, int64_t left, int64_t count, bf16 *to) {
    int64_t terms = terms_of(a, across), size = parts(terms, TERMS) * 2 * TILE;
    if (!across) right_strips(a->weight + left, a->weight_stride, count, terms, to, size);
    else for (int64_t column = 0; column < count; column += SIDE, to += size)
        left_strip(a->weight + (left + column) * a->weight_stride, a->weight_stride, least(SIDE, count - column), terms, to);
}

/* Panels are 32 columns of y. A few of them at a time have their weights made into strips, which the second-level cache holds;
 * then two strips of activations after the other meet them all. Where weights are strips already, one panel at a time does,
 * and meanwhile the next one comes: some of its lines with every two strips of activations. */
INLINE void run_panels(const struct product *a, int across, int64_t first, int64_t last) {
    int64_t terms = terms_of(a, across), columns = columns_of(a, across), size = parts(terms, TERMS) * 2 * TILE;
    int64_t together = a->panels ? 1 : most(1, least(MOST_TOGETHER, CACHED / (PAIR * terms))), tiles = parts(terms, TERMS);
    int64_t lines = a->panels ? parts(PANEL_LINES, parts(a->rows, PAIR)) : 0;
    bf16 *own = a->panels ? NULL : room(together * 2 * size * sizeof(bf16));
    float sums[MOST_TOGETHER * PAIR * PAIR] __attribute__((aligned(64)));
    configure();
    for (int64_t panel = first; panel < last; panel += together) {
        int64_t left = panel * PAIR, strips = parts(least(together * PAIR, columns - left), SIDE);
        strips = least(strips, (last - panel) * 2);
        const bf16 *weights = a->panels ? a->panels + panel * 2 * size : own;
        if (own) split_weight(a, across, left, least(strips * SIDE, columns - left), own);
        for (int64_t row = 0; row < a->rows; row += PAIR) {
            const bf16 *rows = a->strips + row / SIDE * size;
            int row_strips = a->rows - row > SIDE ? 2 : 1;
            int64_t brought = row / PAIR * lines;
            struct ahead ahead = {weights + 2 * size + brought * tiles * TERMS,
                                  panel + 1 < last && brought < PANEL_LINES ? lines : 0};
            for (int64_t s = 0; s < strips; s += 2) {
                int column_strips = strips - s > 1 ? 2 : 1;
                float *sum = sums + s * SIDE * PAIR;
                if (across) multiply(weights + s * size, size, column_strips, rows, size, row_strips, tiles, sum, ahead);
                else multiply(rows, size, row_strips, weights + s * size, size, column_strips, tiles, sum, ahead);
            }
            for (int r = 0; r < row_strips; r++)
                for (int64_t s = 0; s < strips; s++)
                    write_sums(a, sums + (s / 2 * 4 + (across ? s % 2 * 2 + r : r * 2 + s % 2)) * SIDE * SIDE, row + r * SIDE,
                               left + s * SIDE, columns, across);
        }
    }
    _tile_release();
    free(own);
}

/* ------------------------------------------------------------------------------------------------------------ threads */

/* across: y = x W^T + bias, W's rows are the left strips, x's the right ones; else y (+)= g W, g's rows are the left strips,
 * W's columns the right ones; turned: g lies in memory as (out, rows) */
struct work {
    const struct product *product;
    int across, turned;
    int64_t strips;  /* of the activations in one part */
};

static void make_strips(const void *arguments, int64_t first, int64_t last) {
    const struct work work = *(const struct work *)arguments;
    const struct product *a = work.product;
    int64_t terms = terms_of(a, work.across), size = parts(terms, TERMS) * 2 * TILE;
    void (*make)(const float *, int64_t, int64_t, int64_t, bf16 *) =
        work.across ? right_strip_across : work.turned ? left_strip_across : left_strip;
    float *own = a->before ? room(SIDE * terms * sizeof(float)) : NULL;
    for (int64_t strip = first; strip < last; strip++) {
        int64_t rows = least(SIDE, a->rows - strip * SIDE);
        const float *x = a->x + strip * SIDE * (work.turned ? 1 : a->x_stride);
        if (own) {
            struct elementwise before = {0, terms, x, own};
            a->before(&before, 0, rows);
            x = own;
        }
        make(x, a->x_stride, rows, terms, a->strips + strip * size);
        if (a->made_ranks) project(a, x, a->x_stride, terms, strip * SIDE, rows);
    }
    free(own);
}

static void make_panels(const void *arguments, int64_t first, int64_t last) {
    const struct work work = *(const struct work *)arguments;
    /* two calls, so that the compiler makes code for each way, without asking inside the loops */
    if (work.across) run_panels(work.product, 1, first, last);
    else run_panels(work.product, 0, first, last);
}

/* Some of the strips with all panels: made and used by the same thread, and few enough to stay in its cache */
static void make_part(const void *arguments, int64_t first, int64_t last) {
    const struct work work = *(const struct work *)arguments;
    const struct product *a = work.product;
    int64_t all = parts(a->rows, SIDE), size = parts(terms_of(a, work.across), TERMS) * 2 * TILE;
    for (int64_t from = first * work.strips; from < least(last * work.strips, all); from += work.strips) {
        int64_t to = least(from + work.strips, all);
        if (!a->ready) make_strips(&work, from, to);
        struct product own = *a;
        own.rows = least(to * SIDE, a->rows) - from * SIDE;
        own.y += from * SIDE * own.y_stride;
        own.low += from * SIDE * own.low_stride;
        own.strips += from * size;
        struct work of_own = {&own, work.across, 0, 0};
        make_panels(&of_own, 0, parts(columns_of(&own, work.across), PAIR));
    }
}

typedef void sharer(void *fork_join, kernel *stage, const void *arguments, int64_t items, int64_t threads);

/* share is share_rows of elementwise_cpu.c, or none for one thread */
static void run(kernel *stage, struct work work, int64_t items, sharer *share, void *fork_join, int64_t threads) {
    if (share && threads > 1 && items > 1) share(fork_join, stage, &work, items, least(threads, items));
    else stage(&work, 0, items);
}

/* Many rows are shared out by rows, so that every thread reads all weights, and few by panels. Where weights are strips
 * already, they are read anew for every part of a thread's rows, at most HELD numbers: cheaper than reading those anew. */
static void run_product(const struct product *a, int across, int turned, sharer *share, void *fork_join, int64_t threads) {
    int64_t strips = parts(a->rows, SIDE), panels = parts(columns_of(a, across), PAIR), used = share ? threads : 1;
    struct work work = {a, across, turned, 0};
    if (a->rows >= used * ROWS_FOR_ONE) {
        int64_t own = parts(strips, used), held = a->panels ? most(1, HELD / (2 * SIDE * terms_of(a, across))) : own;
        work.strips = parts(parts(own, parts(own, held)), 2) * 2;
        run(make_part, work, parts(strips, work.strips), share, fork_join, threads);
        return;
    }
    if (!a->ready) run(make_strips, work, strips, share, fork_join, threads);
    run(make_panels, work, panels, share, fork_join, threads);
}

void linear(const struct product *a, sharer *share, void *fork_join, int64_t threads) {
    run_product(a, 1, 0, share, fork_join, threads);
}

/* y (+)= g W for the outputs [from, to), the strips of g made of a part of them at a time */
static void add_outputs(struct product a, int64_t from, int64_t to, sharer *share, void *fork_join, int64_t threads) {
    const float *g = a.x, *weight = a.weight;
    bf16 *strips = a.strips = room(parts(a.rows, SIDE) * SIDE * OUT_AT_ONCE * 2 * sizeof(bf16));
    for (int64_t start = from; start < to; start += OUT_AT_ONCE, a.onto = 1) {
        a.out = least(OUT_AT_ONCE, to - start);
        a.x = g + start;
        a.weight = weight + start * a.weight_stride;
        run_product(&a, 0, 0, share, fork_join, threads);
    }
    free(strips);
}

/* Every thread takes some of the outputs, a share, and its sums have a place of their own: so weights become strips once */
struct shares {
    const struct product *product;
    int64_t count;
    float *places;  /* (count - 1, rows, into): the first one's is y */
};

static void sum_shares(const void *arguments, int64_t first, int64_t last) {
    const struct shares shares = *(const struct shares *)arguments;
    const struct product *a = shares.product;
    int64_t length = parts(parts(a->out, shares.count), TERMS) * TERMS;
    for (int64_t share = first; share < last; share++) {
        int64_t from = least(share * length, a->out), to = least(from + length, a->out);
        struct product own = *a;
        if (share) {
            own.y = shares.places + (share - 1) * a->rows * a->into;
            own.y_stride = a->into;
            own.onto = 0;
            if (from == to) memset(own.y, 0, a->rows * a->into * sizeof(float));
        }
        add_outputs(own, from, to, NULL, NULL, 1);
    }
}

static void add_shares(const void *arguments, int64_t first, int64_t last) {
    const struct shares shares = *(const struct shares *)arguments;
    const struct product *a = shares.product;
    for (int64_t share = 1; share < shares.count; share++)
        for (int64_t row = first; row < last; row++) {
            const float *found = shares.places + ((share - 1) * a->rows + row) * a->into;
            for (int64_t i = 0; i < a->into; i++) a->y[row * a->y_stride + i] += found[i];
        }
}

void linear_input_gradient(const struct product *a, sharer *share, void *fork_join, int64_t threads) {
    if (a->strips) run_product(a, 0, 0, share, fork_join, threads);
    else if (!share || threads == 1 || parts(a->out, OUT_AT_ONCE) < threads) add_outputs(*a, 0, a->out, share, fork_join, threads);
    else {
        struct shares shares = {a, threads, room((threads - 1) * a->rows * a->into * sizeof(float))};
        share(fork_join, sum_shares, &shares, threads, threads);
        share(fork_join, add_shares, &shares, a->rows, least(threads, a->rows));
        free(shares.places);
    }
}

/* y (+)= g^T x for g (tokens, out) and x (tokens, into): that is g^T W with x as W */
void linear_weight_gradient(const struct product *a, sharer *share, void *fork_join, int64_t threads) {
    run_product(a, 0, 1, share, fork_join, threads);
}

/* W's strips for either way, for those who keep them */
void split_for_linear(const struct product *a, bf16 *to) { split_weight(a, 1, 0, a->out, to); }
void split_for_input_gradient(const struct product *a, bf16 *to) { split_weight(a, 0, 0, a->into, to); }
