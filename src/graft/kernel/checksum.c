/* Sum over 4 KiB chunks of mix(Σ word · key + chunk · φ); see graft/checksum.py. */
#include <stdint.h>
#include <string.h>

static inline uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

uint64_t graft_checksum(const uint8_t *data, int64_t bytes, uint64_t first, const uint64_t *keys) {
    uint64_t total = 0;
    uint32_t words[1024];
    for (int64_t at = 0; at < bytes; at += 4096, first++) {
        int64_t n = bytes - at < 4096 ? bytes - at : 4096;
        const uint8_t *from = data + at;
        if (n < 4096) {
            memset(words, 0, sizeof words);
            memcpy(words, from, (size_t)n);
            from = (const uint8_t *)words;
        }
        uint64_t h = first * 0x9E3779B97F4A7C15u;
        for (int64_t j = 0; j < 1024; j++) {
            uint32_t word;
            memcpy(&word, from + 4 * j, 4);
            h += word * keys[j];
        }
        total += mix(h);
    }
    return total;
}
