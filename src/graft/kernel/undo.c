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

/* count: {gaps, fixes, raws} written. Room needed at worst: gaps and fixes one an element, raws likewise. */
void graft_exceptions(int dtype, const void *w, int64_t ldw, const void *back, int64_t rows, int64_t cols,
                      uint8_t *gap, int8_t *fix, void *raw, int64_t *count) {
    int64_t since = 0, gaps = 0, fixes = 0, raws = 0, item = dtype == FP32 ? 4 : 2, group = 8 / item;
    for (int64_t i = 0; i < rows; i++) {
        const char *a = (const char *)w + i * ldw * item, *b = (const char *)back + i * cols * item;
        for (int64_t j = 0; j < cols; j++) {
            if (j + group <= cols) {
                uint64_t x, y;
                memcpy(&x, a + j * item, 8);
                memcpy(&y, b + j * item, 8);
                if (x == y) { j += group - 1; since += group; continue; }
            }
            uint32_t x = load_bits(a, j, dtype), y = load_bits(b, j, dtype);
            if (x == y) { since++; continue; }
            for (; since >= 255; since -= 255) gap[gaps++] = 255;
            gap[gaps++] = (uint8_t)since;
            since = 0;
            int64_t apart = order(x, dtype) - order(y, dtype);
            if (apart < -127 || apart > 127) { apart = -128; store_bits(raw, raws++, dtype, x); }
            fix[fixes++] = (int8_t)apart;
        }
    }
    count[0] = gaps; count[1] = fixes; count[2] = raws;
}

/* Correct w, which holds round(W' − ΔW), in place. */
void graft_correct(int dtype, void *w, int64_t ldw, int64_t cols, const uint8_t *gap, int64_t gaps,
                   const int8_t *fix, const void *raw) {
    int64_t at = 0, item = dtype == FP32 ? 4 : 2;
    for (int64_t g = 0; g < gaps; g++) {
        at += gap[g];
        if (gap[g] == 255) continue;
        char *row = (char *)w + at / cols * ldw * item;
        int64_t j = at % cols;
        uint32_t bits;
        if (*fix == -128) { bits = load_bits(raw, 0, dtype); raw = (const char *)raw + item; }
        else bits = unorder(order(load_bits(row, j, dtype), dtype) + *fix, dtype);
        store_bits(row, j, dtype, bits);
        fix++;
        at++;
    }
}
