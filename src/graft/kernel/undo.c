/* The exceptions of an inverse: where round(W' − ΔW) is not W, kept as gaps and small corrections.
 *
 * One byte `gap` an exception: elements passed since the last one; 255 passes 255 and is no exception.
 * One signed byte `fix` an exception: how many floats apart the two are; −128: the weight's own bits
 * stand in `raw`. Elements are counted row by row. graft/undo.py holds the same code in torch.
 */
#include "number.h"

static inline int64_t order(uint32_t bits, int dtype) {
    if (dtype == FP32) return (int32_t)bits < 0 ? (int32_t)(bits ^ 0x7fffffffu) : (int32_t)bits;
    return (int16_t)bits < 0 ? (int16_t)(bits ^ 0x7fffu) : (int16_t)bits;
}

static inline uint32_t unorder(int64_t n, int dtype) {
    if (dtype == FP32) return n < 0 ? (uint32_t)n ^ 0x7fffffffu : (uint32_t)n;
    return (uint16_t)(n < 0 ? (uint16_t)n ^ 0x7fffu : (uint16_t)n);
}

/* One word of 8 bytes: 1 in the top bit of each lane (2 or 4 bytes) that is not zero. */
static inline uint64_t lanes(uint64_t z, int dtype) {
    uint64_t low = dtype == FP32 ? 0x7fffffff7fffffffu : 0x7fff7fff7fff7fffu;
    return (((z & low) + low) | z) & ~low;
}

/* Whether CHUNK bytes at a and b differ; a plain loop that compilers turn into vector code. */
enum { CHUNK = 128 };
static inline int differ(const char *a, const char *b) {
    uint64_t any = 0;
    for (int k = 0; k < CHUNK; k += 8) {
        uint64_t x, y;
        memcpy(&x, a + k, 8);
        memcpy(&y, b + k, 8);
        any |= x ^ y;
    }
    return any != 0;
}

typedef struct {
    uint8_t *gap;
    int8_t *fix;
    char *raw;
    int64_t since, item;
    int dtype;
} list;

static inline void append(list *l, uint32_t x, uint32_t y) {
    for (; l->since >= 255; l->since -= 255) *l->gap++ = 255;
    *l->gap++ = (uint8_t)l->since;
    l->since = 0;
    int64_t apart = order(x, l->dtype) - order(y, l->dtype);
    if (apart < -127 || apart > 127) {
        apart = -128;
        store_bits(l->raw, 0, l->dtype, x);
        l->raw += l->item;
    }
    *l->fix++ = (int8_t)apart;
}

static void scan_row(list *l, const char *a, const char *b, int64_t bytes) {
    int64_t at = 0, shift = l->item == 4 ? 5 : 4;
    while (at < bytes) {
        if (at + CHUNK <= bytes && !differ(a + at, b + at)) {
            l->since += CHUNK / l->item;
            at += CHUNK;
            continue;
        }
        int64_t stop = at + CHUNK < bytes ? at + CHUNK : bytes;
        for (; at + 8 <= stop; at += 8) {
            uint64_t x, y;
            memcpy(&x, a + at, 8);
            memcpy(&y, b + at, 8);
            int64_t seen = 0;
            for (uint64_t m = lanes(x ^ y, l->dtype); m; m &= m - 1) {
                int64_t lane = __builtin_ctzll(m) >> shift;
                l->since += lane - seen;
                seen = lane + 1;
                append(l, load_bits(a + at, lane, l->dtype), load_bits(b + at, lane, l->dtype));
            }
            l->since += 8 / l->item - seen;
        }
        for (; at < stop; at += l->item) {
            uint32_t x = load_bits(a + at, 0, l->dtype), y = load_bits(b + at, 0, l->dtype);
            if (x == y) l->since++;
            else append(l, x, y);
        }
    }
}

/* count: {gaps, fixes, raws} written. Room needed at worst: gaps and fixes one an element, raws likewise. */
void graft_exceptions(int dtype, const void *w, int64_t ldw, const void *back, int64_t rows, int64_t cols,
                      uint8_t *gap, int8_t *fix, void *raw, int64_t *count) {
    int64_t item = dtype == FP32 ? 4 : 2;
    list l = {gap, fix, raw, 0, item, dtype};
    for (int64_t i = 0; i < rows; i++)
        scan_row(&l, (const char *)w + i * ldw * item, (const char *)back + i * cols * item, cols * item);
    count[0] = l.gap - gap;
    count[1] = l.fix - fix;
    count[2] = (l.raw - (char *)raw) / item;
}

/* Correct w, which holds round(W' − ΔW), in place. */
void graft_correct(int dtype, void *w, int64_t ldw, int64_t cols, const uint8_t *gap, int64_t gaps,
                   const int8_t *fix, const void *raw) {
    int64_t j = 0, item = dtype == FP32 ? 4 : 2;
    char *row = w;
    for (int64_t g = 0; g < gaps; g++) {
        for (j += gap[g]; j >= cols; j -= cols) row += ldw * item;
        if (gap[g] == 255) continue;
        uint32_t bits;
        if (*fix == -128) { bits = load_bits(raw, 0, dtype); raw = (const char *)raw + item; }
        else bits = unorder(order(load_bits(row, j, dtype), dtype) + *fix, dtype);
        store_bits(row, j, dtype, bits);
        fix++;
        j++;
    }
}
