/* The limit: the reads and writes of an optimizer step with one addition each. No stores around the cache: the lines
 * were just read. 16-bit elements are added as integers, so that nothing is converted. */
#include <stdint.h>

#define CHUNK 65536

#define STREAM(name, word, number)                                                                              \
    void name(int64_t n, int states, word *p0, const word *g0, number *a0, number *b0, number *c0) {            \
        _Pragma("omp parallel for schedule(static)") for (int64_t lo = 0; lo < n; lo += CHUNK) {                \
            int64_t m = n - lo < CHUNK ? n - lo : CHUNK;                                                        \
            word *restrict p = p0 + lo;                                                                         \
            const word *restrict g = g0 + lo;                                                                   \
            number *restrict a = a0 + lo, *restrict b = b0 + lo, *restrict c = c0 + lo;                         \
            if (states == 0)                                                                                    \
                for (int64_t i = 0; i < m; i++) p[i] += g[i];                                                   \
            else if (states == 1)                                                                               \
                for (int64_t i = 0; i < m; i++) p[i] += g[i], a[i] += 1;                                        \
            else if (states == 2)                                                                               \
                for (int64_t i = 0; i < m; i++) p[i] += g[i], a[i] += 1, b[i] += 1;                             \
            else                                                                                                \
                for (int64_t i = 0; i < m; i++) p[i] += g[i], a[i] += 1, b[i] += 1, c[i] += 1;                  \
        }                                                                                                       \
    }

STREAM(stream2, uint16_t, float)
STREAM(stream4, float, float)
STREAM(stream8, double, double)
