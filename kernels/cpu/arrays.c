/* Knows NumPy arrays again: whether the same are given as before, and nobody made one read-only or changed its memory, dtype
 * or shape in place. A thousand take some 10 µs, where Python needs 100.
 *
 * It needs no header of NumPy: where an array has these fields is part of NumPy's binary interface, which every extension
 * module has compiled in. fastopt/watch.py makes sure of it.
 */
#include "layout.h"

/* Each step is one-to-one, so that a change of one field of one array always shows. */
static uint64_t mix(uint64_t hash, uint64_t x) {
    hash = (hash ^ x) * 0x9E3779B97F4A7C15u;
    return hash ^ hash >> 32;
}

/* A number that is the same while all of the arrays are. */
uint64_t fastopt_look(const watch *w) {
    enum { AHEAD = 16 };
    uint64_t hash = 0;
    for (int64_t i = 0; i < w->count; i++) {
        if (i + AHEAD < w->count) {
            const array *later = (const array *)(w->arrays[i + AHEAD].object + w->head);
            __builtin_prefetch(later);
            __builtin_prefetch(&later->flags);
            __builtin_prefetch(w->arrays[i + AHEAD].shape);
        }
        const char *object = w->arrays[i].object;
        const array *a = (const array *)(object + w->head);
        if (((const void **)a)[-1] != w->arrays[i].type) return ~w->seen; /* another object in its place */
        uint64_t one = mix((uintptr_t)a->data, (uintptr_t)a->dtype); /* apart from hash: arrays need not wait for another */
        one = mix(one, (uint64_t)(unsigned)a->flags << 32 | (unsigned)a->nd);
        w->arrays[i].shape = a->shape;
        for (int k = 0; k < a->nd; k++) one = mix(one, (uint64_t)a->shape[k]);
        hash = mix(hash, one);
    }
    return hash;
}

/* Whether a list, which is as long, holds the same objects, and all arrays are as they were. The list keeps those alive that
 * nobody else does, and Python's lock is held. */
bool fastopt_unchanged(const watch *w, void *list) {
    for (int64_t i = 0; i < w->listed_count; i++)
        if (w->get_item(list, i) != w->listed[i]) return false;
    return fastopt_look(w) == w->seen;
}
