/* AMX's tile registers and instructions in software, put before products_amx.c (-include) so that its kernels run where
 * no such unit is. What they need beside it, AVX-512 with bf16, multiplies as the unit does: pairs of bf16, sums in fp32, no
 * denormal numbers. It says nothing of the real unit's speed, of its registers' set-up, or of asking Linux for them. */
#include <immintrin.h>
#include <stdint.h>

static __thread __m512i software_tiles[8][16];

static inline void software_load(int tile, const void *from, int64_t stride) {
    for (int row = 0; row < 16; row++) software_tiles[tile][row] = _mm512_loadu_si512((const char *)from + row * stride);
}

static inline void software_store(int tile, void *to, int64_t stride) {
    for (int row = 0; row < 16; row++) _mm512_storeu_si512((char *)to + row * stride, software_tiles[tile][row]);
}

static inline void software_zero(int tile) {
    for (int row = 0; row < 16; row++) software_tiles[tile][row] = _mm512_setzero_si512();
}

/* sums[m] += sum over the pairs k of left[m][k] right[k] */
static inline void software_multiply(int sums, int left, int right) {
    for (int m = 0; m < 16; m++) {
        __m512 sum = (__m512)software_tiles[sums][m];
        const int32_t *pairs = (const int32_t *)&software_tiles[left][m];
        for (int k = 0; k < 16; k++)
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pairs[k]), (__m512bh)software_tiles[right][k]);
        software_tiles[sums][m] = (__m512i)sum;
    }
}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadd(tile, from, stride) software_load(tile, from, stride)
#define _tile_stored(tile, to, stride) software_store(tile, to, stride)
#define _tile_zero(tile) software_zero(tile)
#define _tile_dpbf16ps(sums, left, right) software_multiply(sums, left, right)
#define _tile_loadconfig(config) ((void)(config))
#define _tile_release() ((void)0)
