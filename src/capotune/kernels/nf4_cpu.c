/* Four-bit quantisation on the CPU; kernels/nf4/reference.py holds the same arithmetic in PyTorch, and the tests hold the two to
 * the same bits. Every function works on the blocks [first, last) of a flat tensor of n numbers and touches nothing
 * else, so that threads can share a call. Compile without -ffast-math and with -ffp-contract=off. */
#include <stdint.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__AVX512BW__) || defined(__F16C__)
#include <immintrin.h>
#endif

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, LARGEST_BLOCK = 4096, NESTED_BLOCK = 256 };
#define SMALLEST_SCALE 1e-38f

static inline float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t as_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

/* Exact for every finite number, subnormals too: shift the fields into place and correct the exponent's bias by 2^112.
 * The largest finite fp16 is 65504; what lands above it was infinity or NaN. */
static inline float half_to_float(uint16_t h) {
    float magnitude = as_float((uint32_t)(h & 0x7fff) << 13) * 0x1p112f;
    magnitude = magnitude >= 65536.0f ? __builtin_inff() : magnitude;
    return as_float(as_bits(magnitude) | (uint32_t)(h & 0x8000) << 16);
}

static void to_float(const void *in, int dtype, int64_t start, int64_t count, float *out) {
    const uint16_t *in16 = (const uint16_t *)in + start;
    if (dtype == FLOAT32) memcpy(out, (const float *)in + start, 4 * count);
    else if (dtype == BFLOAT16) for (int64_t i = 0; i < count; i++) out[i] = as_float((uint32_t)in16[i] << 16);
    else for (int64_t i = 0; i < count; i++) out[i] = half_to_float(in16[i]);
}

/* Magnitudes order like their bits, and infinity and NaN lie above all finite ones: the caller finds them in absmax. */
static float largest_magnitude(const float *x, int64_t count) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t magnitude = as_bits(x[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    return as_float(largest);
}

/* index[i] = how many of the ascending midpoints lie below x[i]; plain comparisons, which become vectors. */
static inline void count_below(const float *x, int64_t count, const float *midpoints, int levels, uint8_t *index) {
    for (int64_t i = 0; i < count; i++) {
        int32_t below = 0;
        for (int k = 0; k < levels; k++) below += x[i] > midpoints[k];
        index[i] = (uint8_t)below;
    }
}

/* x /= its largest magnitude, which goes to *absmax. A short last block is divided and keeps the floor: see
 * _scale_to_unit in nf4/reference.py. */
static void scale_to_unit(float *x, int64_t count, int is_short, float *absmax) {
    float largest = largest_magnitude(x, count);
    float scale = largest < SMALLEST_SCALE ? SMALLEST_SCALE : largest, inverse = 1.0f / scale;
    if (is_short) for (int64_t i = 0; i < count; i++) x[i] /= scale;
    else for (int64_t i = 0; i < count; i++) x[i] *= inverse;
    *absmax = is_short ? scale : largest;
}

void quantize_4bit(const void *in, int dtype, int64_t n, int64_t block_size, int64_t first, int64_t last,
                   const float *midpoints, const uint8_t *order, uint8_t *codes, float *absmax) {
    float x[LARGEST_BLOCK];
    uint8_t index[LARGEST_BLOCK];
    for (int64_t b = first; b < last; b++) {
        int64_t start = b * block_size, count = n - start < block_size ? n - start : block_size;
        to_float(in, dtype, start, count, x);
        scale_to_unit(x, count, count < block_size, absmax + b);
        if (count % 2) x[count++] = 0.0f; /* the unused half byte at the very end */
        count_below(x, count, midpoints, 15, index);
        for (int64_t i = 0; i < count; i += 2)
            codes[(start + i) / 2] = (uint8_t)(order[index[i]] << 4 | order[index[i + 1]]);
    }
}

/* The statistics of the above, less their mean, in 8 bits: absmax[n], blocks of 256. */
void quantize_absmax(const float *absmax, const float *offset, int64_t n, int64_t first, int64_t last,
                     const float *midpoints, uint8_t *codes, float *nested_absmax) {
    float x[NESTED_BLOCK];
    for (int64_t b = first; b < last; b++) {
        int64_t start = b * NESTED_BLOCK, count = n - start < NESTED_BLOCK ? n - start : NESTED_BLOCK;
        for (int64_t i = 0; i < count; i++) x[i] = absmax[start + i] - *offset;
        scale_to_unit(x, count, count < NESTED_BLOCK, nested_absmax + b);
        count_below(x, count, midpoints, 255, codes + start);
    }
}

/* The sixteen numbers that a block can hold, rounded to 16 bits. */
static void round_to_16(const float *x, int dtype, uint16_t *out) {
    if (dtype == BFLOAT16) {
        for (int k = 0; k < 16; k++) { /* to nearest, ties to even */
            uint32_t bits = as_bits(x[k]);
            out[k] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
        }
        return;
    }
#if defined(__F16C__)
    for (int k = 0; k < 16; k += 8)
        _mm_storeu_si128((__m128i *)(out + k), _mm256_cvtps_ph(_mm256_loadu_ps(x + k), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__FLT16_MAX__)
    for (int k = 0; k < 16; k++) { _Float16 h = (_Float16)x[k]; memcpy(out + k, &h, 2); }
#else
#error "this compiler has no 16-bit floating point; the PyTorch path is used"
#endif
}

#if defined(__AVX512BW__)
/* 16 bytes -> 32 codes in order. Bits above the low four of each are left in: the permutations do not read them. */
static inline __m256i spread(const uint8_t *codes) {
    __m128i low = _mm_loadu_si128((const __m128i *)codes), high = _mm_srli_epi16(low, 4);
    return _mm256_set_m128i(_mm_unpackhi_epi8(high, low), _mm_unpacklo_epi8(high, low));
}
#endif

static void look_up_32(const uint8_t *codes, const float *table, int64_t count, float *out) {
    int64_t i = 0;
#if defined(__AVX512BW__)
    __m512 values = _mm512_loadu_ps(table);
    for (; i + 32 <= count; i += 32) {
        __m256i index = spread(codes + i / 2);
        __m512i lower = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(index));
        __m512i upper = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(index, 1));
        _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(lower, values));
        _mm512_storeu_ps(out + i + 16, _mm512_permutexvar_ps(upper, values));
    }
#endif
    for (; i < count; i++) out[i] = table[codes[i / 2] >> (i % 2 ? 0 : 4) & 15];
}

static void look_up_16(const uint8_t *codes, const uint16_t *table, int64_t count, uint16_t *out) {
    int64_t i = 0;
#if defined(__AVX512BW__)
    __m512i values = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)table));
    for (; i + 32 <= count; i += 32)
        _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(spread(codes + i / 2)), values));
#endif
    for (; i < count; i++) out[i] = table[codes[i / 2] >> (i % 2 ? 0 : 4) & 15];
}

/* A block holds sixteen different numbers, so one multiplies (and rounds) the table and looks the rest up.
 * absmax[b], or map[absmax8[b]] * nested_absmax[b / 256] + offset where absmax8 is given. */
void dequantize_4bit(const uint8_t *codes, int64_t n, int64_t block_size, int64_t first, int64_t last,
                     const float *table, const float *absmax, const uint8_t *absmax8, const float *map,
                     const float *nested_absmax, const float *offset, void *out, int dtype) {
    for (int64_t b = first; b < last; b++) {
        int64_t start = b * block_size, count = n - start < block_size ? n - start : block_size;
        float scale = absmax8 ? map[absmax8[b]] * nested_absmax[b / NESTED_BLOCK] + *offset : absmax[b];
        float scaled[16];
        uint16_t rounded[16];
        for (int k = 0; k < 16; k++) scaled[k] = table[k] * scale;
        if (dtype == FLOAT32) {
            look_up_32(codes + start / 2, scaled, count, (float *)out + start);
        } else {
            round_to_16(scaled, dtype, rounded);
            look_up_16(codes + start / 2, rounded, count, (uint16_t *)out + start);
        }
    }
}

/* Ask for 2 MiB pages before a large new buffer is first written: most of the time of a 180 MB dequantisation went to
 * faulting in 4 KiB pages. A hint; nothing depends on it. */
void ask_for_huge_pages(void *buffer, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = 1 << 21;
    uintptr_t first = ((uintptr_t)buffer + page - 1) & ~(page - 1), last = ((uintptr_t)buffer + bytes) & ~(page - 1);
    if (first < last) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)buffer, (void)bytes;
#endif
}
