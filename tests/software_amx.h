/* AMX's tile registers and instructions in software, put before products_amx.c or prepacked_amx.c (-include) so that their
 * kernels run where the processor has no AMX. What they need beside it, AVX-512 with bf16, multiplies as AMX does: pairs of
 * bf16, sums in fp32, no denormal numbers. It says nothing of AMX's speed, of its registers' set-up, or of asking Linux for
 * them. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

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

/* sums[m][n] += sum over the fours k of left[m][k] right[k][n], of 8 bits */
static inline void software_multiply_bytes(int sums, int left, int right) {
    int32_t sum[16][16];
    int8_t l[16][64], r[16][64];
    memcpy(sum, software_tiles[sums], sizeof sum);
    memcpy(l, software_tiles[left], sizeof l);
    memcpy(r, software_tiles[right], sizeof r);
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++)
            for (int k = 0; k < 64; k++) sum[m][n] += l[m][k] * r[k / 4][4 * n + k % 4];
    memcpy(software_tiles[sums], sum, sizeof sum);
}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadd(tile, from, stride) software_load(tile, from, stride)
#define _tile_stored(tile, to, stride) software_store(tile, to, stride)
#define _tile_zero(tile) software_zero(tile)
#define _tile_dpbf16ps(sums, left, right) software_multiply(sums, left, right)
#define _tile_dpbssd(sums, left, right) software_multiply_bytes(sums, left, right)
#define _tile_loadconfig(config) ((void)(config))
#define _tile_release() ((void)0)

/* The source's own, under another name, asks for registers that are not there. */
int64_t ask_for_amx(void) { return 1; }
#define ask_for_amx ask_linux_for_amx
