/* Hands chunks of the segment table to OpenMP threads. The arithmetic is in the kernels, which Numba compiles.
 *
 * The tables are built in fastopt/engine/table.py; the structures here and in layout.py describe the same bytes.
 * Chunks do not depend on the number of threads and no two chunks share an element, so neither do the results.
 */
#include <math.h>
#include <omp.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

typedef double (*update_kernel)(int64_t lo, int64_t hi, void **arrays, const double *scalars, const double *own);
typedef void (*round_kernel)(int64_t lo, int64_t hi, const void *parameter, void *copy);
typedef double (*norm_kernel)(int64_t lo, int64_t hi, void *x);
typedef double (*ratio_kernel)(double w_norm, double g_norm, const double *scalars);

enum { PARAMETER, GRADIENT };      /* places in arrays, norm and squares */
enum { MULTIPLIER, RATIO, ZERO };  /* places in own */
enum { KNOW_W = 1, KNOW_G = 2 };
enum { LANES = 32, BLOCK = 2048 };

typedef struct {
    update_kernel update;
    norm_kernel norm[2];
    ratio_kernel ratio; /* NULL where the segment has no trust ratio */
    const double *scalars;
    round_kernel round; /* NULL where the parameters have no 16-bit copy */
    void *copy;
    void *arrays[8]; /* parameter, gradient, states */
    double own[3];
    double squares[2]; /* sums of squares of parameter and gradient as stored */
} segment;

typedef struct {
    int64_t segment, lo, hi;
} chunk;

typedef struct {
    int64_t segments, chunks, elements; /* how many of each; waves follow one another */
} wave;

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

/* What layout.py says, too: the library of another version must not be used. The first number is how many there are. */
const int64_t *fastopt_layout(void) {
    static const int64_t layout[] = {
        25, sizeof(segment), sizeof(chunk), sizeof(wave), offsetof(segment, update), offsetof(segment, norm),
        offsetof(segment, ratio), offsetof(segment, scalars), offsetof(segment, round), offsetof(segment, copy),
        offsetof(segment, arrays), offsetof(segment, own), offsetof(segment, squares), offsetof(chunk, segment),
        offsetof(chunk, lo), offsetof(chunk, hi), PARAMETER, GRADIENT, MULTIPLIER, RATIO, ZERO, KNOW_W, KNOW_G, LANES,
        BLOCK,
    };
    return layout;
}

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

/* A 16-bit copy is written block by block, while the parameters are in the first-level cache. The sums of squares of the
 * blocks are added in the order in which the kernel would add them. */
static double update_chunk(const segment *segments, const chunk *c) {
    const segment *s = segments + c->segment;
    if (!s->round) return s->update(c->lo, c->hi, (void **)s->arrays, s->scalars, s->own);
    mode m = enter();
    double squares = 0;
    for (int64_t lo = c->lo, hi; lo < c->hi; lo = hi) {
        hi = lo + BLOCK < c->hi ? lo + BLOCK : c->hi;
        squares += s->update(lo, hi, (void **)s->arrays, s->scalars, s->own);
        s->round(lo, hi, s->arrays[PARAMETER], s->copy);
    }
    squares = settled(squares);
    leave(m);
    return squares;
}

static double chunk_squares(const segment *segments, const chunk *c, int which) {
    const segment *s = segments + c->segment;
    return s->norm[which](c->lo, c->hi, s->arrays[which]);
}

/* Lane j adds numbers j, j + 32, ... in order; then the lanes are added pairwise (reductions.py). */
static double sum_lanes(const double *x, int64_t count, int64_t stride) {
    double lanes[LANES] = {0};
    for (int64_t i = 0; i < count; i++) lanes[i % LANES] += x[i * stride];
    for (int width = LANES / 2; width; width /= 2)
        for (int j = 0; j < width; j++) lanes[j] += lanes[j + width];
    return lanes[0];
}

/* squares[which] of each segment is the sum of its chunks' partial sums. */
static void sum_chunks(segment *segments, const chunk *chunks, int64_t count, const double *partials, int which) {
    for (int64_t i = 0, end; i < count; i = end) {
        for (end = i + 1; end < count && chunks[end].segment == chunks[i].segment;) end++;
        segments[chunks[i].segment].squares[which] = sum_lanes(partials + i, end - i, 1);
    }
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
#pragma omp parallel for schedule(dynamic, batch) num_threads(team(threads))
    for (int64_t i = 0; i < count; i++) partials[i] = chunk_squares(segments, chunks + i, which);
    mode m = enter();
    sum_chunks(segments, chunks, count, partials, which);
    double total = settled(sum_lanes(&segments->squares[which], segment_count, sizeof(segment) / sizeof(double)));
    leave(m);
    return total;
}

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

/* Rules with a trust ratio per segment. A wave is a few segments whose data fit into the cache: their norms are taken
 * and the update follows before the data are gone. */
void fastopt_layers(segment *segments, const chunk *chunks, const wave *waves, int64_t count, double *w_partials,
                    double *g_partials, int flags, double *counts, int64_t half, int threads) {
    mode m = enter();
    segment *first = segments;
    for (const wave *w = waves; w < waves + count; w++) {
        if (!(flags & KNOW_W) || !(flags & KNOW_G)) {
#pragma omp parallel num_threads(team(threads))
            FOR_MY_CHUNKS(chunks, w->chunks, w->elements, 0, {
                if (!segments[chunks[i].segment].ratio) continue;
                if (!(flags & KNOW_W)) w_partials[i] = chunk_squares(segments, chunks + i, PARAMETER);
                if (!(flags & KNOW_G)) g_partials[i] = chunk_squares(segments, chunks + i, GRADIENT);
            });
            if (!(flags & KNOW_W)) sum_chunks(segments, chunks, w->chunks, w_partials, PARAMETER);
            if (!(flags & KNOW_G)) sum_chunks(segments, chunks, w->chunks, g_partials, GRADIENT);
        }
        for (segment *s = first; s < first + w->segments; s++)
            if (s->ratio)
                s->own[RATIO] = s->ratio(sqrt(s->squares[PARAMETER]),
                                         fabs(s->own[MULTIPLIER]) * sqrt(s->squares[GRADIENT]), s->scalars);
#pragma omp parallel num_threads(team(threads))
        FOR_MY_CHUNKS(chunks, w->chunks, w->elements, 1, w_partials[i] = update_chunk(segments, chunks + i));
        sum_chunks(segments, chunks, w->chunks, w_partials, PARAMETER);
        first += w->segments;
        chunks += w->chunks;
        w_partials += w->chunks;
        g_partials += w->chunks;
    }
    leave(m);
    commit(counts, half);
}
