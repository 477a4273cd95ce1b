/* What products_amx.c and frozen_amx.c share: the set-up of AMX, Intel's matrix unit, and threads. */
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
typedef void kernel(const void *arguments, int64_t first, int64_t last);
typedef void sharer(void *fork_join, kernel *stage, const void *arguments, int64_t items, int64_t threads);

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }
INLINE __mmask16 first_of(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1); }

/* Eight tiles of 16 rows of 64 bytes, for this thread until _tile_release */
INLINE void configure(void) {
    struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {1, 0, {0}, {0}, {0}};
    for (int tile = 0; tile < 8; tile++) { config.bytes[tile] = 64; config.rows[tile] = SIDE; }
    _tile_loadconfig(&config);
}

/* Never read. A tile store that comes 2,700 cycles after the last one, or later, costs 1,000 more (measured: the stores'
 * path falls asleep), and a long sum takes as many. So some tile is stored now and then meanwhile. */
static _Thread_local float unread[SIDE * SIDE] __attribute__((aligned(64)));

INLINE void *room(int64_t bytes) {
    void *space = aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64);
    if (!space) abort();
    return space;
}

/* share is share_rows of elementwise_cpu.c, or none for one thread */
INLINE void run(kernel *stage, const void *work, int64_t items, sharer *share, void *fork_join, int64_t threads) {
    if (share && threads > 1 && items > 1) share(fork_join, stage, work, items, least(threads, items));
    else stage(work, 0, items);
}
