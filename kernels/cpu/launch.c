/* Hands chunks of the segment table to OpenMP threads. The arithmetic is in the kernels, which Numba compiles.
 *
 * The tables are built in fastopt/engine/table.py; the structures here and in layout.py describe the same bytes.
 * Chunks do not depend on the number of threads and no two chunks share an element, so neither do the results.
 */
#include "layout.h"

#include <math.h>
#include <omp.h>
#include <pthread.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

/* GNU OpenMP cannot start threads in the child of a fork: there, everything runs in the calling thread. */
static int forked;

static void after_fork(void) { forked = 1; }

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, after_fork); }

/* Where a thread cannot be started (limits of processes, memory, cgroups) GNU OpenMP ends the process. So before this
 * thread's team becomes larger than ever, as many threads are started for a moment, and a team is what could be. */
enum { MOST_THREADS = 1024 };

static _Thread_local int proven = 1, refused = MOST_THREADS + 1;

static void *wait_for_all(void *all_started) {
    pthread_mutex_lock(all_started);
    pthread_mutex_unlock(all_started);
    return NULL;
}

static int prove(int threads) {
    pthread_mutex_t all_started = PTHREAD_MUTEX_INITIALIZER;
    pthread_t started[MOST_THREADS];
    int count = 0;
    pthread_mutex_lock(&all_started);
    while (count < threads - 1 && !pthread_create(started + count, NULL, wait_for_all, &all_started)) count++;
    pthread_mutex_unlock(&all_started);
    for (int i = 0; i < count; i++) pthread_join(started[i], NULL);
    /* Of fewer, the room of one is left for what OpenMP and others need. */
    return count == threads - 1 ? threads : count > 1 ? count : 1;
}

static int team(int threads) {
    if (forked) return 1;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads > proven && threads < refused) {
        int possible = prove(threads);
        if (possible < threads) refused = threads;
        if (possible > proven) proven = possible;
    }
    return threads <= proven ? threads : proven;
}

/* The library of another version must not be used. */
int fastopt_layout(void) { return FASTOPT_LAYOUT; }

int fastopt_default_threads(void) { return omp_get_max_threads(); }

/* The best instruction set that kernels are compiled for and this processor and system support. */
const char *fastopt_isa(void) {
#if defined(__x86_64__)
    /* Processors with these have the rest of x86-64-v3, and likewise below. But virtual machines may hide F16C. */
    __builtin_cpu_init();
    unsigned a, b, features = 0, d;
    int v3 = __get_cpuid(1, &a, &b, &features, &d) && features & bit_F16C && __builtin_cpu_supports("avx2") &&
             __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    if (v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return "x86-64-v4";
    return v3 ? "x86-64-v3" : "x86-64-v2";
#else
    return "native";
#endif
}

/* Sums are formed in the floating-point environment of the kernels (environment.py), whatever the process has set. What is
 * added comes from memory, and goes there or to the caller through `settled`: so it stays between the two. */
#if defined(__x86_64__)
typedef uint32_t mode;
static mode get_mode(void) {
    mode m;
    __asm__ volatile("stmxcsr %0" : "=m"(m) : : "memory");
    return m;
}
static void set_mode(mode m) { __asm__ volatile("ldmxcsr %0" : : "m"(m) : "memory"); }
static double settled(double x) {
    __asm__ volatile("" : "+x"(x));
    return x;
}
enum { DEFAULT_MODE = 0x1F80, CONTROL = ~0x3F };
#elif defined(__aarch64__)
typedef uint64_t mode;
static mode get_mode(void) {
    mode m;
    __asm__ volatile("mrs %0, fpcr" : "=r"(m) : : "memory");
    return m;
}
static void set_mode(mode m) { __asm__ volatile("msr fpcr, %0" : : "r"(m) : "memory"); }
static double settled(double x) {
    __asm__ volatile("" : "+w"(x));
    return x;
}
enum { DEFAULT_MODE = 0, CONTROL = -1 };
#else
typedef int mode;
static mode get_mode(void) { return 0; }
static void set_mode(mode m) { (void)m; }
static double settled(double x) { return x; }
enum { DEFAULT_MODE = 0, CONTROL = -1 };
#endif

static mode enter(void) {
    mode m = get_mode();
    if ((m & CONTROL) != DEFAULT_MODE) set_mode(DEFAULT_MODE);
    return m;
}

static void leave(mode m) {
    if ((m & CONTROL) != DEFAULT_MODE) set_mode(m);
}

/* Epilogues follow strip by strip, while the parameters are in the first-level cache: where the kernel sums squares, block
 * by block, which are then added in the order in which it would add them. */
static double update_chunk(const segment *segments, const chunk *c) {
    const segment *s = segments + c->segment;
    if (!s->epilogues->kernel) return s->update(c->lo, c->hi, (void **)s->arrays, s->scalars, s->own);
    mode m = enter();
    double squares = 0;
    int64_t strip = s->ratio && !s->terms ? BLOCK : STRIP;
    for (int64_t lo = c->lo, hi; lo < c->hi; lo = hi) {
        hi = lo + strip < c->hi ? lo + strip : c->hi;
        squares += s->update(lo, hi, (void **)s->arrays, s->scalars, s->own);
        for (const epilogue *e = s->epilogues; e < s->epilogues + EPILOGUES && e->kernel; e++)
            e->kernel(lo, hi, s->arrays[PARAMETER], e->target, e->number);
    }
    squares = settled(squares);
    leave(m);
    return squares;
}

static double chunk_squares(const segment *segments, const chunk *c, int which) {
    const segment *s = segments + c->segment;
    return s->squares[which](c->lo, c->hi, s->arrays[which]);
}

/* What the ratio of chunk i's segment needs to know of that chunk. Each place in `sums` has a row of partial sums, which
 * are `stride` apart. The two first are known already where `known` says so. */
static void chunk_sums(const segment *segments, const chunk *chunks, int64_t i, double *partials, int64_t stride,
                       int known) {
    const segment *s = segments + chunks[i].segment;
    if (!s->ratio) return;
    if (s->terms) {
        double sums[SUMS] = {0};
        s->terms(chunks[i].lo, chunks[i].hi, (void **)s->arrays, s->scalars, s->own, sums);
        for (int k = 0; k < SUMS; k++) partials[k * stride + i] = sums[k];
        return;
    }
    for (int k = PARAMETER; k <= GRADIENT; k++)
        if (!(known >> k & 1)) partials[k * stride + i] = chunk_squares(segments, chunks + i, k);
}

/* Lane j adds numbers j, j + 32, ... in order; then the lanes are added pairwise (reductions.py). */
static double sum_lanes(const double *x, int64_t count, int64_t stride) {
    double lanes[LANES] = {0};
    for (int64_t i = 0; i < count; i++) lanes[i % LANES] += x[i * stride];
    for (int width = LANES / 2; width; width /= 2)
        for (int j = 0; j < width; j++) lanes[j] += lanes[j + width];
    return lanes[0];
}

/* Each of the segments' sums is that of their chunks' partial sums: the places that have a bit in `places`, or, where a
 * segment has terms, in `of_terms`. */
static void sum_chunks(segment *segments, const chunk *chunks, int64_t count, const double *partials, int64_t stride,
                       int places, int of_terms) {
    for (int64_t i = 0, end; i < count; i = end) {
        segment *s = segments + chunks[i].segment;
        for (end = i + 1; end < count && chunks[end].segment == chunks[i].segment;) end++;
        for (int k = 0; k < SUMS; k++)
            if ((s->terms ? of_terms : places) >> k & 1) s->sums[k] = sum_lanes(partials + k * stride + i, end - i, 1);
    }
}

static void decide(segment *segments, int64_t count) {
    for (segment *s = segments; s < segments + count; s++)
        if (s->ratio) s->own[RATIO] = s->ratio(s->sums, s->own[MULTIPLIER], s->scalars);
}

/* The last act of a step (Counts in fastopt/engine/table.py): what is counted in the second half becomes the first. */
static void commit(double *counts, int64_t half) { memcpy(counts, counts + half, half * sizeof *counts); }

void fastopt_update(const segment *segments, const chunk *chunks, int64_t count, double *counts, int64_t half,
                    int threads) {
    /* Dynamic: cores are not equally fast, or not equally free. Several chunks at a time: arrays may be small. */
    int64_t batch = count / (32 * (int64_t)threads) + 1;
#pragma omp parallel for schedule(dynamic, batch) num_threads(team(threads))
    for (int64_t i = 0; i < count; i++) update_chunk(segments, chunks + i);
    commit(counts, half);
}

/* Sums of squares of each segment, and as the result the sum over all of them. */
double fastopt_squares(segment *segments, int64_t segment_count, const chunk *chunks, int64_t count, double *partials,
                       int which, int threads) {
    int64_t batch = count / (32 * (int64_t)threads) + 1;
    double *row = partials + which * count;
#pragma omp parallel for schedule(dynamic, batch) num_threads(team(threads))
    for (int64_t i = 0; i < count; i++) row[i] = chunk_squares(segments, chunks + i, which);
    mode m = enter();
    sum_chunks(segments, chunks, count, partials, count, 1 << which, 1 << which);
    double total = settled(sum_lanes(&segments->sums[which], segment_count, sizeof(segment) / sizeof(double)));
    leave(m);
    return total;
}

enum { EVERY_SUM = (1 << SUMS) - 1 };

/* The sums of all segments that have a ratio: the first pass where something must be done with them before the ratios. */
void fastopt_sums(segment *segments, const chunk *chunks, int64_t count, double *partials, int known, int threads) {
    int64_t batch = count / (32 * (int64_t)threads) + 1;
#pragma omp parallel for schedule(dynamic, batch) num_threads(team(threads))
    for (int64_t i = 0; i < count; i++) chunk_sums(segments, chunks, i, partials, count, known);
    mode m = enter();
    sum_chunks(segments, chunks, count, partials, count, ~known & (KNOW_W | KNOW_G), EVERY_SUM);
    leave(m);
}

/* The ratios of all segments by their sums; an update of all follows. */
void fastopt_ratios(segment *segments, int64_t count) { decide(segments, count); }

/* Calls work for the chunks of a wave that fall to this thread. Each thread takes neighbours that hold an equal share of
 * the elements, the same ones at every call: it finds in its own cache what it read before. Backwards, what it read last
 * comes first. */
#define FOR_MY_CHUNKS(chunks, count, elements, backwards, work)                              \
    do {                                                                                     \
        int64_t threads_ = omp_get_num_threads(), me_ = omp_get_thread_num(), before_ = 0;   \
        int64_t first_ = 0, last_ = 0;                                                       \
        for (int64_t i = 0; i < (count); i++) {                                              \
            int64_t owner = before_ * threads_ / (elements);                                 \
            if (owner < me_) first_ = i + 1;                                                 \
            if (owner <= me_) last_ = i + 1;                                                 \
            before_ += (chunks)[i].hi - (chunks)[i].lo;                                      \
        }                                                                                    \
        for (int64_t k = first_; k < last_; k++) {                                           \
            int64_t i = (backwards) ? first_ + last_ - 1 - k : k;                            \
            work;                                                                            \
        }                                                                                    \
    } while (0)

/* The same in waves, which are a few segments whose data fit into the cache: their sums are taken, and the update follows
 * before the data are gone. */
void fastopt_waves(segment *segments, const chunk *chunks, int64_t chunk_count, const wave *waves, int64_t count,
                   double *partials, int known, double *counts, int64_t half, int threads) {
    mode m = enter();
    segment *first = segments;
    for (const wave *w = waves; w < waves + count; w++) {
#pragma omp parallel num_threads(team(threads))
        FOR_MY_CHUNKS(chunks, w->chunks, w->elements, 0,
                      chunk_sums(segments, chunks, i, partials, chunk_count, known));
        sum_chunks(segments, chunks, w->chunks, partials, chunk_count, ~known & (KNOW_W | KNOW_G), EVERY_SUM);
        decide(first, w->segments);
#pragma omp parallel num_threads(team(threads))
        FOR_MY_CHUNKS(chunks, w->chunks, w->elements, 1,
                      partials[PARAMETER * chunk_count + i] = update_chunk(segments, chunks + i));
        sum_chunks(segments, chunks, w->chunks, partials, chunk_count, KNOW_W, 0);
        first += w->segments;
        chunks += w->chunks;
        partials += w->chunks;
    }
    leave(m);
    commit(counts, half);
}
