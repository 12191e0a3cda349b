/* out = round(w + sign · left · diag(scale) · right), rounded once, and what its inverse needs.
 *
 * A panel of columns at a time: sums in float (double when the output is float32) with an error bound t
 * decide every element for which v − t and v + t round alike; the others go to settle(), first in double
 * with its own bound, then without error. See graft/delta.py for the definition that this computes.
 *
 * Legend: w[rows, cols] with row stride ldw, left[rows, rank], right[rank, cols] with row stride ldr,
 * all strides in elements; scale[rank] already carries the sign.
 */
#include <fenv.h>
#include <stdlib.h>

#include "number.h"

#if defined(__AVX512F__)
#define LANES 16
#define VECS 4
#elif defined(__AVX__)
#define LANES 8
#define VECS 2
#else
#define LANES 4
#define VECS 2
#endif
#define TILE 4                    /* rows that share one pass over the packed panel */
#define STEP (LANES * VECS)
#define PANEL 256                 /* columns; rank 16 then fits the first-level cache */

typedef float vf __attribute__((vector_size(LANES * 4), aligned(4)));
typedef double vd __attribute__((vector_size(LANES * 4), aligned(8)));

typedef struct {
    int64_t rank, ldl, ldr;
    const float *left, *right;
    const double *scale;
} factors;

typedef struct {
    float *ls, *panel, *amax;     /* scaled left [rows, rank]; packed panel [rank, PANEL]; max |panel[k]| */
    double *lsd, *paneld;         /* the same in double, for float32 outputs */
    double *parts;                /* room for an exact sum: 2 rank + 2 */
} scratch;

/* One element that the panel's sum could not decide; right[k·STEP] is its column of the packed panel.
 * Adds to *broken if the result is not finite. */
static uint32_t settle(uint32_t wbits, int din, int dout, const factors *f, int64_t row, const float *right,
                       double sign, double *parts, int64_t *broken) {
    const float *left = f->left + row * f->ldl;
    double w = value_of(wbits, din), sums[4] = {0}, sizes[4] = {0};
    uint32_t own = din == dout ? wbits : round_float((float)w, dout);
    if (!isfinite(w)) return own;
    for (int64_t k = 0; k < f->rank; k += 4)
        for (int64_t q = 0; q < 4 && k + q < f->rank; q++) {   /* four chains: one would wait for itself */
            double p = f->scale[k + q] * left[k + q] * right[(k + q) * STEP];
            sums[q] += p;
            sizes[q] += fabs(p);
        }
    double v = (sums[0] + sums[1]) + (sums[2] + sums[3]), size = (sizes[0] + sizes[1]) + (sizes[2] + sizes[3]);
    if (size == 0) return own;
    v = w + sign * v;
    double t = (size * (double)(f->rank + 4) + fabs(v)) * 0x1p-51;
    uint32_t out = round_double(v - t, dout);
    if (out != round_double(v + t, dout)) {
        exact_sum sum = {parts, 0};
        for (int64_t k = 0; k < f->rank; k++) {
            double p = (double)left[k] * right[k * STEP];
            volatile double hi = p * f->scale[k];   /* volatile: no contraction into the sums below */
            volatile double lo = fma(p, f->scale[k], -hi);
            exact_add(&sum, sign * hi);
            exact_add(&sum, sign * lo);
        }
        if (sum.count == 0) return own;
        exact_add(&sum, w);
        out = round_double(exact_to_odd(&sum), dout);
    }
    if (!isfinite(value_of(out, dout))) *broken += 1;
    return out;
}

/* acc[TILE][n] = ls[TILE, rank] · panel[rank, n], n a multiple of STEP. The panel lies tile by tile, so that a
 * tile's rows are neighbours: rows of a whole panel would fall on the same few lines of the cache.
 * Summed in chains of CHAIN products, so that the error bound grows with rank / CHAIN + CHAIN, not rank. */
#define CHAIN 8
#define SUMS(name, type, vec, width)                                                             \
    static inline void name##_tile(const type *ls, const type *panel, int64_t rank,              \
                                   vec s[TILE][VECS]) {                                          \
        memset(s, 0, sizeof(vec) * TILE * VECS);                                                 \
        for (int64_t c = 0; c < rank; c += CHAIN) {                                              \
            vec t[TILE][VECS];                                                                   \
            memset(t, 0, sizeof t);                                                              \
            for (int64_t k = c; k < rank && k < c + CHAIN; k++) {                                \
                const vec *r = (const vec *)(panel + k * (width) * VECS);                        \
                for (int i = 0; i < TILE; i++)                                                   \
                    for (int q = 0; q < VECS; q++) t[i][q] += ls[i * rank + k] * r[q];           \
            }                                                                                    \
            for (int i = 0; i < TILE; i++)                                                       \
                for (int q = 0; q < VECS; q++) s[i][q] += t[i][q];                               \
        }                                                                                        \
    }                                                                                            \
    static void name(const type *ls, const type *panel, int64_t rank, int64_t n, type *acc) {    \
        for (int64_t j = 0; j < n; j += (width) * VECS) {                                        \
            vec s[TILE][VECS];                                                                   \
            name##_tile(ls, panel + j * rank, rank, s);                                          \
            for (int i = 0; i < TILE; i++)                                                       \
                for (int q = 0; q < VECS; q++)                                                   \
                    ((vec *)(acc + i * PANEL + j))[q] = s[i][q];                                 \
        }                                                                                        \
    }
SUMS(sums_float, float, vf, LANES)
SUMS(sums_double, double, vd, LANES / 2)

/* Round w + sign·acc for n elements; open[j] ≠ 0 where the bound does not decide. Returns any(open).
 * 0x1p-22·|v| covers the rounding of v itself and of v ± t. */
static inline uint32_t round_fp16(const float *w, const float *acc, float sign, float bound, int64_t n,
                           uint16_t *out, uint16_t *open) {
    uint32_t any = 0;
    for (int64_t j = 0; j < n; j++) {
        float v = w[j] + sign * acc[j], t = bound + u2f(f2u(v) & 0x7fffffffu) * 0x1p-22f;
        uint32_t low = float_to_fp16(v - t), high = float_to_fp16(v + t);
        uint32_t o = (low ^ high) | ((high & 0x7c00u) == 0x7c00u) | ((low & 0x7c00u) == 0x7c00u);
        out[j] = (uint16_t)low;
        open[j] = (uint16_t)o;
        any |= o;
    }
    return any;
}

/* The same for bf16, from the distance d of v to the nearest midpoint, in units of v's last place u:
 * closed iff (d − 8)·u > bound. d is capped at 2^14, the distance to the midpoint below a power of two;
 * 8 units cover v's own rounding. Zeros, subnormals and what nears infinity stay open. */
static inline uint32_t round_bf16(const float *w, const float *acc, float sign, float bound, int64_t n,
                           uint16_t *out, uint16_t *open) {
    uint32_t any = 0;
    for (int64_t j = 0; j < n; j++) {
        uint32_t v = f2u(w[j] + sign * acc[j]), power = v & 0x7f800000u;
        int32_t off = (int32_t)(v & 0xffff) - 0x8000;
        int32_t d = off < 0 ? -off : off;
        d = (d < 0x4000 ? d : 0x4000) - 8;
        float reach = (float)d * (u2f(power) * 0x1p-23f);
        uint32_t o = (uint32_t)!(reach > bound) | (uint32_t)(power >= 0x7f000000u);
        out[j] = (uint16_t)((v + 0x7fff + ((v >> 16) & 1)) >> 16);
        open[j] = (uint16_t)o;
        any |= o;
    }
    return any;
}

static inline void widen(const void *w, int din, int64_t n, float *wide) {
    const uint16_t *half = w;
    if (din == BF16) for (int64_t j = 0; j < n; j++) wide[j] = bf16_to_float(half[j]);
    else if (din == FP16) for (int64_t j = 0; j < n; j++) wide[j] = fp16_to_float(half[j]);
    else memcpy(wide, w, (size_t)n * 4);
}

static inline uint32_t round_fp32(const float *w, const double *acc, double sign, double bound, int64_t n,
                           uint32_t *out, uint16_t *open) {
    uint32_t any = 0;
    for (int64_t j = 0; j < n; j++) {
        double v = (double)w[j] + sign * acc[j], t = bound + fabs(v) * 0x1p-51;
        uint32_t low = f2u((float)(v - t)), high = f2u((float)(v + t));
        uint32_t o = (low ^ high) | ((high & 0x7f800000u) == 0x7f800000u);
        out[j] = low;
        open[j] = o != 0;
        any |= o;
    }
    return any;
}

/* Pack right[:, c : c + n] into the panel, zero-padded to whole tiles, with each row's largest |value|. */
static void pack(const factors *f, int64_t n, int wide, scratch *s) {
    int64_t r = f->rank, half = STEP / 2;
    for (int64_t k = 0; k < r; k++) {
        float row[PANEL];
        memcpy(row, f->right + k * f->ldr, (size_t)n * 4);
        memset(row + n, 0, (size_t)(PANEL - n) * 4);
        uint32_t top = 0;
        for (int64_t j = 0; j < PANEL; j++) {
            uint32_t m = f2u(row[j]) & 0x7fffffffu;
            top = m > top ? m : top;
        }
        s->amax[k] = u2f(top);
        for (int64_t j = 0; j < PANEL; j += STEP) memcpy(s->panel + j * r + k * STEP, row + j, STEP * 4);
        if (!wide) continue;
        for (int64_t j = 0; j < PANEL; j += half)
            for (int64_t q = 0; q < half; q++) s->paneld[j * r + k * half + q] = row[j + q];
    }
}

/* Bound on the error of one row's sums over the panel: γ_n Σ|ls|·amax, n roundings on the way of a product
 * to the sum (ls itself, its chain, the chains' sum), plus what underflow can lose. */
static double bound_of(const scratch *s, int64_t row, int64_t rank, int wide) {
    double size = 0, other = 0;   /* two sums: one would wait for each addition */
    for (int64_t k = 0; k < rank; k += 2) {
        int64_t m = row * rank + k, last = k + 1 == rank;
        size += (wide ? fabs(s->lsd[m]) : fabs((double)s->ls[m])) * s->amax[k];
        other += last ? 0 : (wide ? fabs(s->lsd[m + 1]) : fabs((double)s->ls[m + 1])) * s->amax[k + 1];
    }
    size += other;
    double unit = wide ? 0x1p-53 : 0x1p-24, n = (double)(CHAIN + rank / CHAIN + 4) * unit;
    return size * n / (1 - n) * 1.0001 + (size > 0 ? (wide ? 0x1p-1000 : 0x1p-120) : 0);
}

typedef struct {
    int din, dout;
    const void *w;
    int64_t ldw;
    void *out;
    int64_t ldo;
} operand;

/* Round n elements of a row, from column `at` of the panel that begins at `col`; settle what stays open. */
static void row_of_panel(const operand *x, const factors *f, scratch *s, int64_t row, int64_t col, int64_t at,
                         int64_t n, const void *acc, double bound, double sign, int64_t *broken) {
    uint16_t open[PANEL];
    const char *w = (const char *)x->w + (row * x->ldw + col + at) * (x->din == FP32 ? 4 : 2);
    char *out = (char *)x->out + (row * x->ldo + col + at) * (x->dout == FP32 ? 4 : 2);
    uint32_t kept[PANEL];         /* settle() needs w after an in-place store */
    memcpy(kept, w, (size_t)n * (x->din == FP32 ? 4 : 2));
    if (bound == 0) {             /* ΔW is zero here: the weight's own bits stay, −0 too */
        for (int64_t j = 0; j < n; j++) {
            uint32_t own = load_bits(kept, j, x->din);
            store_bits(out, j, x->dout, x->din == x->dout ? own : round_float(value_of(own, x->din), x->dout));
        }
        return;
    }
    float wide[PANEL], reach = (float)(bound * 1.001), side = (float)sign;
    widen(kept, x->din, n, wide);
    uint32_t any;
    if (x->dout == FP32) any = round_fp32(wide, acc, sign, bound, n, (uint32_t *)out, open);
    else if (x->dout == BF16) any = round_bf16(wide, acc, side, reach, n, (uint16_t *)out, open);
    else any = round_fp16(wide, acc, side, reach, n, (uint16_t *)out, open);
    if (!any) return;
    for (int64_t j = 0; j < n; j++) {
        if ((j & 3) == 0 && j + 4 <= n) {
            uint64_t four;
            memcpy(&four, open + j, 8);
            if (four == 0) { j += 3; continue; }
        }
        if (open[j])
            store_bits(out, j, x->dout, settle(load_bits(kept, j, x->din), x->din, x->dout, f, row,
                                               s->panel + (at + j) / STEP * STEP * f->rank + (at + j) % STEP,
                                               sign, s->parts, broken));
    }
}

typedef struct {
    const operand *forward, *inverse;
    const factors *f;
    scratch *s;
    int64_t broken;
} job;

/* Forward, and if asked the inverse, of n elements of one row from their sums. */
static void both_ways(job *b, int64_t row, int64_t col, int64_t at, int64_t n, const void *acc, double bound) {
    int64_t ignored = 0;
    row_of_panel(b->forward, b->f, b->s, row, col, at, n, acc, bound, 1.0, &b->broken);
    if (b->inverse) row_of_panel(b->inverse, b->f, b->s, row, col, at, n, acc, bound, -1.0, &ignored);
}

#include "fast.h"

/* The panel's part of the next rows: runs this short are too brief for the processor to foresee. */
static inline void fetch(const operand *x, int64_t row, int64_t rows, int64_t col, int64_t n) {
    int64_t item = x->din == FP32 ? 4 : 2;
    for (int64_t q = row; q < row + TILE && q < rows; q++) {
        const char *from = (const char *)x->w + (q * x->ldw + col) * item;
        for (int64_t at = 0; at < n * item; at += 64) __builtin_prefetch(from + at, 1);
    }
}

/* One panel: n columns from col. */
static void panel(job *b, int64_t rows, int64_t col, int64_t n) {
    int wide = b->forward->dout == FP32;
    int64_t r = b->f->rank, done = 0;
    union { float f[TILE * PANEL]; double d[TILE * PANEL]; } acc;
    if (fast(b)) done = n / STEP * STEP;
    for (int64_t i = 0; i < rows; i += TILE) {
        int64_t some = rows - i < TILE ? rows - i : TILE, whole = (n - done + STEP - 1) / STEP * STEP;
        double bound[TILE];
        fetch(b->forward, i + TILE, rows, col, n);
        for (int64_t q = 0; q < some; q++) bound[q] = bound_of(b->s, i + q, r, wide);
        if (done) fast_rows(b, i, some, col, done, bound);
        if (done == n) continue;
        if (wide) sums_double(b->s->lsd + i * r, b->s->paneld, r, whole, acc.d);
        else sums_float(b->s->ls + i * r, b->s->panel + done * r, r, whole, acc.f);
        for (int64_t q = 0; q < some; q++)
            both_ways(b, i + q, col, done, n - done,
                      wide ? (void *)(acc.d + q * PANEL) : (void *)(acc.f + q * PANEL), bound[q]);
    }
}

/* forward: out = round(w + ΔW). inverse, if given: inverse.out = round(inverse.w − ΔW), from the same sums. */
static int64_t run(const operand *forward, const operand *inverse, int64_t rows, int64_t cols, factors f) {
    int wide = forward->dout == FP32;
    int64_t padded = (rows + TILE - 1) / TILE * TILE, r = f.rank;
    size_t item = wide ? 8 : 4;
    char *room = calloc(1, (size_t)(padded * r + r * PANEL) * (item + (wide ? 4 : 0)) + (size_t)r * 4 +
                               (size_t)(2 * r + 4) * 8 + 64);
    if (!room) return -1;
    scratch s = {0};
    s.parts = (double *)room;
    char *next = room + (2 * r + 4) * 8;
    if (wide) {
        s.lsd = (double *)next; next += padded * r * 8;
        s.paneld = (double *)next; next += r * PANEL * 8;
    }
    s.ls = (float *)next; next += padded * r * 4;
    s.panel = (float *)next; next += r * PANEL * 4;
    s.amax = (float *)next;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t k = 0; k < r; k++) {
            double scaled = f.scale[k] * f.left[i * f.ldl + k];
            if (wide) s.lsd[i * r + k] = scaled;
            else s.ls[i * r + k] = (float)scaled;
        }
    job b = {forward, inverse, &f, &s, 0};
    const float *right = f.right;
    for (int64_t c = 0; c < cols; c += PANEL) {
        int64_t n = cols - c < PANEL ? cols - c : PANEL;
        f.right = right + c;
        pack(&f, n, wide, &s);
        panel(&b, rows, c, n);
    }
    free(room);
    return b.broken;
}

/* Flush-to-zero, if the caller's thread has it on, would lose subnormals: run in the default environment. */
static int64_t run_safely(const operand *forward, const operand *inverse, int64_t rows, int64_t cols,
                          factors f) {
    fenv_t env;
    fegetenv(&env);
    fesetenv(FE_DFL_ENV);
    int64_t broken = run(forward, inverse, rows, cols, f);
    fesetenv(&env);
    return broken;
}

/* Returns how many finite w gave an infinite or NaN result; −1 when memory ran out. */
int64_t graft_add(int din, const void *w, int64_t ldw, int dout, void *out, int64_t ldo, int64_t rows,
                  int64_t cols, int64_t rank, const float *left, int64_t ldl, const float *right, int64_t ldr,
                  const double *scale) {
    operand forward = {din, dout, w, ldw, out, ldo};
    factors f = {rank, ldl, ldr, left, right, scale};
    return run_safely(&forward, NULL, rows, cols, f);
}

/* fused[rows, cols] = round(w + ΔW) and back[rows, cols] = round(fused − ΔW), both dense. */
int64_t graft_there_and_back(int dtype, const void *w, int64_t ldw, void *fused, void *back, int64_t rows,
                             int64_t cols, int64_t rank, const float *left, int64_t ldl, const float *right,
                             int64_t ldr, const double *scale) {
    operand forward = {dtype, dtype, w, ldw, fused, cols}, inverse = {dtype, dtype, fused, cols, back, cols};
    factors f = {rank, ldl, ldr, left, right, scale};
    return run_safely(&forward, &inverse, rows, cols, f);
}

/* graft_add for the flat range [start, start + count) of a row-major matrix of `width` columns, as far as
 * the term with rows r0 … r1 and columns c0 … c1 covers it; src and dst hold that range. */
int64_t graft_add_flat(int din, const void *src, int dout, void *dst, int64_t start, int64_t count,
                       int64_t width, int64_t r0, int64_t r1, int64_t c0, int64_t c1, int64_t rank,
                       const float *left, int64_t ldl, const float *right, int64_t ldr, const double *scale) {
    int64_t broken = 0, stop = start + count, size = 1 << 18;   /* elements of a block: it stays in cache */
    while (start < stop) {
        int64_t row = start / width, col = start % width, rows = 1, end;
        if (col || stop - start < width) end = stop < (row + 1) * width ? stop : (row + 1) * width;
        else {
            rows = (stop - start) / width;
            if (rows > size / width) rows = size / width > 1 ? size / width : 1;
            end = start + rows * width;
        }
        int64_t top = row > r0 ? row : r0, bottom = row + rows < r1 ? row + rows : r1;
        int64_t first = col > c0 ? col : c0, last = rows > 1 || end == (row + 1) * width ? width : end - row * width;
        last = last < c1 ? last : c1;
        if (top < bottom && first < last) {
            int64_t at = (top - row) * width + first - col;
            int64_t from = start - (stop - count) + at;
            int64_t n = graft_add(din, (const char *)src + from * (din == FP32 ? 4 : 2), width, dout,
                                  (char *)dst + from * (dout == FP32 ? 4 : 2), width, bottom - top, last - first,
                                  rank, left + (top - r0) * ldl, ldl, right + (first - c0), ldr, scale);
            if (n < 0) return n;
            broken += n;
        }
        start = end;
    }
    return broken;
}
