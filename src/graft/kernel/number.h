/* Numbers: bf16 and fp16 to and from float, double rounded once, and sums without error.
 *
 * Law: every function that rounds does so once, to nearest even. Nothing here may be compiled with
 * -ffast-math: the exact sums live on the order of their operations.
 */
#ifndef GRAFT_NUMBER_H
#define GRAFT_NUMBER_H

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BF16 = 0, FP16 = 1, FP32 = 2 };

static inline uint32_t f2u(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static inline float u2f(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
static inline uint64_t d2u(double x) { uint64_t u; memcpy(&u, &x, 8); return u; }

static inline float bf16_to_float(uint16_t h) { return u2f((uint32_t)h << 16); }

static inline uint16_t float_to_bf16(float x) {
    uint32_t u = f2u(x);
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

/* Subnormals go through an integer conversion or a magic addend, never through float subnormals. */
static inline float fp16_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, mag = h & 0x7fff;
    uint32_t normal = (mag << 13) + 0x38000000u;
    normal = mag >= 0x7c00 ? (mag << 13) | 0x7f800000u : normal;
    uint32_t tiny = f2u((float)(int32_t)mag * 0x1p-24f);
    return u2f(sign | (mag < 0x400 ? tiny : normal));
}

static inline uint16_t float_to_fp16(float x) {
    uint32_t u = f2u(x), sign = (u >> 16) & 0x8000, mag = u & 0x7fffffffu;
    uint32_t normal = (mag + 0xfff + ((mag >> 13) & 1) - 0x38000000u) >> 13;
    normal = normal > 0x7c00 ? 0x7c00 : normal;
    normal = mag >= 0x47800000u ? 0x7c00 : normal;
    uint32_t tiny = f2u(u2f(mag) + 0.5f) - 0x3f000000u;
    return (uint16_t)(sign | (mag < 0x38800000u ? tiny : normal));
}

/* double → float rounded to odd, so that a second rounding to bf16 or fp16 is the only one that shows. */
static inline float double_to_odd(double x) {
    float near = (float)x;
    if ((double)near == x || x != x) return near;
    uint32_t u = f2u(near);
    if (fabs((double)near) > fabs(x)) u -= 1;
    return u2f(u | 1);
}

/* Bits of x in the dtype (as uint32, low half for 16-bit dtypes). */
static inline uint32_t round_double(double x, int dtype) {
    if (dtype == FP32) return f2u((float)x);
    float odd = double_to_odd(x);
    return dtype == BF16 ? float_to_bf16(odd) : float_to_fp16(odd);
}

static inline uint32_t round_float(float x, int dtype) {
    if (dtype == FP32) return f2u(x);
    if (x != x) return dtype == BF16 ? 0x7fc0 : 0x7e00;
    return dtype == BF16 ? float_to_bf16(x) : float_to_fp16(x);
}

static inline uint32_t load_bits(const void *p, int64_t at, int dtype) {
    return dtype == FP32 ? ((const uint32_t *)p)[at] : ((const uint16_t *)p)[at];
}

static inline void store_bits(void *p, int64_t at, int dtype, uint32_t bits) {
    if (dtype == FP32) ((uint32_t *)p)[at] = bits;
    else ((uint16_t *)p)[at] = (uint16_t)bits;
}

static inline float value_of(uint32_t bits, int dtype) {
    if (dtype == FP32) return u2f(bits);
    return dtype == BF16 ? bf16_to_float((uint16_t)bits) : fp16_to_float((uint16_t)bits);
}

/* A sum kept without error as non-overlapping doubles of increasing size (Shewchuk 1997, grow-expansion). */
typedef struct { double *part; int count; } exact_sum;

static inline void exact_add(exact_sum *s, double x) {
    int kept = 0;
    for (int i = 0; i < s->count; i++) {
        double y = s->part[i];
        if (fabs(x) < fabs(y)) { double t = x; x = y; y = t; }
        double hi = x + y, lo = y - (hi - x);
        if (lo != 0) s->part[kept++] = lo;
        x = hi;
    }
    if (x != 0) s->part[kept++] = x;
    s->count = kept;
}

/* The exact sum, rounded to odd in double. */
static inline double exact_to_odd(const exact_sum *s) {
    int n = s->count;
    if (n == 0) return 0.0;
    double hi = s->part[--n], rest = 0.0;
    while (n > 0 && rest == 0.0) {
        double x = hi, y = s->part[--n];
        hi = x + y;
        rest = y - (hi - x);
    }
    if (rest != 0.0 && (d2u(hi) & 1) == 0) hi = nextafter(hi, rest > 0 ? INFINITY : -INFINITY);
    return hi;
}

#endif
