/* What products_amx.c and prepacked_amx.c share: the set-up of AMX (Intel's Advanced Matrix Extensions). */
#define _GNU_SOURCE
#include <cpuid.h>
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common.h"

enum { SIDE = 16, AWAKE = 4 };

INLINE __mmask16 first_of(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1); }

/* Eight tiles of 16 rows of 64 bytes, for this thread until _tile_release */
INLINE void configure(void) {
    struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {1, 0, {0}, {0}, {0}};
    for (int tile = 0; tile < 8; tile++) { config.bytes[tile] = 64; config.rows[tile] = SIDE; }
    _tile_loadconfig(&config);
}

/* Never read. A tile store that comes 2,700 cycles after the last one, or later, costs 1,000 more (measured: the stores'
 * path falls asleep), and a long sum takes as many. So a tile is stored now and then meanwhile. */
static _Thread_local float unread[SIDE * SIDE] __attribute__((aligned(64)));

INLINE void *workspace(int64_t bytes) {
    void *space = aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64);
    if (!space) abort();
    return space;
}
