/* Sum over 4 KiB chunks of mix(NH(chunk) + number · φ); see graft/checksum.py. */
#include <stdint.h>
#include <string.h>

static inline uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

uint64_t graft_checksum(const uint8_t *data, int64_t bytes, uint64_t first, const uint64_t *keys) {
    uint64_t total = 0;
    uint8_t tail[4096];
    for (int64_t at = 0; at < bytes; at += 4096, first++) {
        const uint8_t *from = data + at;
        if (bytes - at < 4096) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, from, (size_t)(bytes - at));
            from = tail;
        }
        uint64_t h = first * 0x9E3779B97F4A7C15u;
        for (int64_t j = 0; j < 512; j++) {
            uint64_t x, k = keys[j];
            memcpy(&x, from + 8 * j, 8);
            h += (uint64_t)(uint32_t)(x + k) * (uint32_t)((x >> 32) + (k >> 32));
        }
        total += mix(h);
    }
    return total;
}
