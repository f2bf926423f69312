/* Runs the schedule (schedule.py, which Numba compiles) as a team of OpenMP threads. */
#include "layout.h"

#include <omp.h>
#include <pthread.h>
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

typedef void schedule(void *table, int64_t act, int64_t flags, int64_t me, int64_t threads, void (*barrier)(void));

static void wait_for_team(void) {
#pragma omp barrier
}

static void alone(void) {}

void fastopt_run(schedule *run, void *table, int64_t act, int64_t flags, int threads) {
    threads = team(threads);
    if (threads == 1) { /* OpenMP would take longer than a small update */
        run(table, act, flags, 0, 1, alone);
        return;
    }
#pragma omp parallel num_threads(threads)
    run(table, act, flags, omp_get_thread_num(), omp_get_num_threads(), wait_for_team);
}
