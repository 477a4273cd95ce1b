/* What the C sources of this folder share: the structs of abi.h, how kernels are called, the transpose of a tile. */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define INLINE static inline __attribute__((always_inline))

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

/* ------------------------------------------------------------------------------------------- structs, as abi.h has them */

typedef void kernel(const void *arguments, int64_t first, int64_t last);
typedef void sharer(void *fork_join, kernel *work, const void *arguments, int64_t items, int64_t threads);
typedef void sharing_kernel(const void *arguments, sharer *share, void *fork_join, int64_t threads);

#define STRUCT(name) struct name {
#define FIELD(type, name) type name;
#define END(name) };
#define KERNEL(name, structure) kernel name;
#define SHARING_KERNEL(name, structure) sharing_kernel name;
#include "abi.h"
#undef STRUCT
#undef FIELD
#undef END
#undef KERNEL
#undef SHARING_KERNEL

/* Writes what C makes of each struct and field, for abi.py to compare: lines of "struct . struct 0 size" and "struct field
 * kind offset size". Returns the text's length, which is more than there was space for if that is so. */
int64_t abi_table(char *text, int64_t space) {
    int64_t used = 0;
#define LINE_OF(...) used += snprintf(used < space ? text + used : NULL, used < space ? space - used : 0, __VA_ARGS__);
#define KIND(value) _Generic(value, int64_t: "int64_t", double: "double", default: "pointer")
#define STRUCT(name)                \
    {                               \
        typedef struct name fields; \
        const char *of = #name;     \
        LINE_OF("%s . struct 0 %zu\n", of, sizeof(fields))
#define FIELD(type, name) \
    LINE_OF("%s %s %s %zu %zu\n", of, #name, KIND(((fields *)0)->name), offsetof(fields, name), sizeof(((fields *)0)->name))
#define END(name) }
#define KERNEL(name, structure)
#define SHARING_KERNEL(name, structure)
#include "abi.h"
#undef STRUCT
#undef FIELD
#undef END
#undef KERNEL
#undef SHARING_KERNEL
    return used;
}

/* -------------------------------------------------------------------------------------------------------------- threads */

/* All items of a kernel. share is share_rows of elementwise_cpu.c, or none for one thread. */
INLINE void share_out(kernel *work, const void *arguments, int64_t items, sharer *share, void *fork_join, int64_t threads) {
    if (share && threads > 1 && items > 1) share(fork_join, work, arguments, items, least(threads, items));
    else work(arguments, 0, items);
}

/* -------------------------------------------------------------------------------------------------------------- AVX-512 */

#ifdef __AVX512F__
#include <immintrin.h>

/* 16 x 16 values of 4 bytes, rows for columns */
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
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}
#endif
