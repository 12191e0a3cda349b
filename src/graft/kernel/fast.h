/* bf16 to bf16 in registers: sums, rounding and the test of openness without a store in between.
 *
 * v − t and v + t are rounded by the processor's own conversion, two vectors at a time. It flushes
 * subnormals, which does no harm: t ≥ 2^-120, so whatever is that small has ends of different sign and is
 * open. Only what is decided leaves the registers; a row of a tile with an open element goes to
 * both_ways(). Included by fuse.c.
 */
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#include <immintrin.h>

static inline int fast(const job *b) { return b->forward->din == BF16 && b->forward->dout == BF16; }

/* 32 elements: x ± s rounded to bf16; *open gets a bit for each undecided one. */
static inline __m512i decide(__m512i x, __m512 s0, __m512 s1, __m512 bound, __mmask32 *open) {
    const __m512 tiny = _mm512_set1_ps(0x1p-22f);
    __m512 v0 = _mm512_add_ps(_mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm512_castsi512_si256(x)), 16)), s0);
    __m512 v1 = _mm512_add_ps(_mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1)), 16)), s1);
    __m512 t0 = _mm512_fmadd_ps(_mm512_abs_ps(v0), tiny, bound);
    __m512 t1 = _mm512_fmadd_ps(_mm512_abs_ps(v1), tiny, bound);
    __m512i low = (__m512i)_mm512_cvtne2ps_pbh(_mm512_sub_ps(v1, t1), _mm512_sub_ps(v0, t0));
    __m512i high = (__m512i)_mm512_cvtne2ps_pbh(_mm512_add_ps(v1, t1), _mm512_add_ps(v0, t0));
    /* infinite or NaN: the magnitude's bits, shifted to the top, reach those of infinity */
    __mmask32 wild = _mm512_cmpge_epu16_mask(_mm512_slli_epi16(high, 1), _mm512_set1_epi16((short)0xff00)) |
                     _mm512_cmpge_epu16_mask(_mm512_slli_epi16(low, 1), _mm512_set1_epi16((short)0xff00));
    *open |= _mm512_cmpneq_epi16_mask(low, high) | wild;
    return low;
}

/* One row of a tile; returns whether it is stored. */
static inline int fast_row(const uint16_t *w, uint16_t *out, uint16_t *back, const vf *s, __m512 bound) {
    __m512i there[VECS / 2], home[VECS / 2];
    __mmask32 open = 0;
    const __m512 zero = _mm512_setzero_ps();
    for (int q = 0; q < VECS / 2; q++) {
        __m512 s0 = (__m512)s[2 * q], s1 = (__m512)s[2 * q + 1];
        there[q] = decide(_mm512_loadu_si512(w + q * 2 * LANES), s0, s1, bound, &open);
        if (back) home[q] = decide(there[q], _mm512_sub_ps(zero, s0), _mm512_sub_ps(zero, s1), bound, &open);
    }
    if (open) return 0;
    for (int q = 0; q < VECS / 2; q++) {
        _mm512_storeu_si512(out + q * 2 * LANES, there[q]);
        if (back) _mm512_storeu_si512(back + q * 2 * LANES, home[q]);
    }
    return 1;
}

/* Rows i … i + some of a panel, its first `count` columns (whole tiles). */
static void fast_rows(job *b, int64_t i, int64_t some, int64_t col, int64_t count, const double *bound) {
    const operand *x = b->forward, *y = b->inverse;
    int64_t r = b->f->rank;
    __m512 reach[TILE];
    for (int64_t q = 0; q < some; q++) reach[q] = _mm512_set1_ps((float)(bound[q] * 1.001));
    for (int64_t j = 0; j < count; j += STEP) {
        vf s[TILE][VECS];
        sums_float_tile(b->s->ls + i * r, b->s->panel + j * r, r, s);
        for (int64_t q = 0; q < some; q++) {
            int64_t row = i + q, at = col + j;
            const uint16_t *w = (const uint16_t *)x->w + row * x->ldw + at;
            uint16_t *out = (uint16_t *)x->out + row * x->ldo + at;
            uint16_t *back = y ? (uint16_t *)y->out + row * y->ldo + at : NULL;
            if (bound[q] == 0 || !fast_row(w, out, back, s[q], reach[q])) both_ways(b, row, col, j, STEP, s[q], bound[q]);
        }
    }
}
#else
static inline int fast(const job *b) { (void)b; return 0; }
static void fast_rows(job *b, int64_t i, int64_t some, int64_t col, int64_t count, const double *bound) {
    (void)b; (void)i; (void)some; (void)col; (void)count; (void)bound;
}
#endif
