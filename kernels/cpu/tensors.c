/* Reads where the gradients of PyTorch's parameters are, a thousand in some 50 µs, where Python needs 400.
 *
 * It needs no header of torch: tensors are asked through the functions of torch's stable C interface
 * (torch/csrc/inductor/aoti_torch/c/shim.h), and two of its C++ functions; fastopt/torch/_interface.py finds the addresses.
 * A tensor handle of that interface points to an at::Tensor, which is nothing but a pointer to a TensorImpl.
 */
#include "layout.h"

#include <stddef.h>

enum { AHEAD = 16 };
enum { STRIDED = 0, CPU = 0 }; /* c10::Layout, c10::DeviceType */

/* Whether some of these bytes are in one of the runs: if so, in the last that begins before their end. How many begin
 * before it is kept, for they will be as many in the next step. */
static bool hits(const runs *owned, uintptr_t begin, int64_t nbytes, int64_t *before) {
    uintptr_t end = begin + nbytes;
    int64_t lo = *before, hi = owned->count;
    if ((lo && owned->begin[lo - 1] >= end) || (lo < hi && owned->begin[lo] < end)) {
        for (lo = 0; lo < hi;) { /* runs before lo begin before the end, those from hi on do not */
            int64_t middle = lo + (hi - lo) / 2;
            if (owned->begin[middle] < end)
                lo = middle + 1;
            else
                hi = middle;
        }
        *before = lo;
    }
    return nbytes && lo && owned->end[lo - 1] > begin;
}

/* Whether the Python object still has this TensorImpl: only then does that exist. */
static bool has_impl(const torch_functions *t, const known *k) {
    return *(void *const *)(k->object + t->impl_at) == k->impl;
}

static bool is_as(const torch_functions *t, void *tensor, const expected *e, int32_t dtype, void **data) {
    int32_t layout, device, found;
    int64_t dim, *sizes, *strides, elements = 1;
    if (t->get_layout(tensor, &layout) || layout != STRIDED) return false; /* others have no data pointer */
    if (t->get_device_type(tensor, &device) || device != t->device_type) return false;
    if (device != CPU && (t->get_device_index(tensor, &device) || device != t->device_index)) return false;
    if (t->get_dtype(tensor, &found) || found != dtype) return false;
    if (t->get_dim(tensor, &dim) || dim != e->dim) return false;
    if (t->get_sizes(tensor, &sizes) || t->get_strides(tensor, &strides)) return false;
    for (int64_t k = 0; k < dim; k++) {
        if (sizes[k] != e->sizes[k] || (strides[k] != e->strides[k] && sizes[k] != 1)) return false;
        elements *= sizes[k];
    }
    return !t->get_data_ptr(tensor, data) && (*data || !elements);
}

/* Release the gradients that fastopt_gradients held; those that it did not hold are NULL. */
void fastopt_release(const torch_functions *t, void **held, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        if (held[i]) t->delete_tensor_object(held[i]);
        held[i] = NULL;
    }
}

/* Each tensor lies in cache lines of its own, which nobody read since the last step. */
static void fetch_impl(const void *impl) {
    for (int line = 0; line < 4; line++) __builtin_prefetch((const char *)impl + 64 * line);
}

static void fetch(const torch_functions *t, const known *k) {
    __builtin_prefetch(k->object + t->impl_at);
    fetch_impl(k->impl);
    __builtin_prefetch(k->storage);
}

/* Whether all states are where they were. */
static bool unmoved(const torch_functions *t, const states *s) {
    for (int64_t i = 0; i < s->count; i++) {
        known k = s->tensors[i];
        void *data;
        if (i + AHEAD < s->count) fetch(t, s->tensors + i + AHEAD);
        if (!has_impl(t, &k) || t->get_data_ptr(&k.impl, &data) || data != k.data) return false;
    }
    return true;
}

/* The addresses of all gradients, which are kept alive until they are released. False, and nothing is held, where a
 * parameter, a state or a gradient is not as expected, or a gradient lies where the step writes. The caller holds
 * Python's lock, so that none goes away meanwhile. */
bool fastopt_gradients(const torch_functions *t, expected *parameters, int64_t count, const states *written,
                       const runs *owned, void **pointers, void **held) {
    int64_t found = 0, i = 0;
    if (!unmoved(t, written)) return false; /* first: parameters and gradients will be wanted again after this */
    for (; i < count; i++) {
        expected *e = parameters + i;
        if (i + AHEAD < count) {
            const expected *next = e + AHEAD;
            fetch(t, &next->parameter);
            __builtin_prefetch(next->holder);
            fetch_impl(next->gradient);
            __builtin_prefetch(next->gradient_storage);
        }
        if (!has_impl(t, &e->parameter)) break;
        void *data, *gradient = t->grad(e->parameter.impl);
        bool defined;
        if (t->is_defined(gradient, &defined) || defined != (e->dim >= 0)) break;
        if (!defined) continue;
        e->holder = gradient, e->gradient = *(void **)gradient;
        if (!is_as(t, &e->parameter.impl, e, e->dtype, &data) || data != e->parameter.data) break;
        if (!is_as(t, gradient, e, e->gradient_dtype, pointers + found)) break;
        if (hits(owned, (uintptr_t)pointers[found], e->nbytes, &e->before)) break;
        if (t->new_tensor_handle(gradient, held + found)) break;
        found++;
    }
    if (i == count) return true;
    fastopt_release(t, held, found);
    return false;
}

/* Tell autograd that the parameters with a gradient were written. False, and it knows nothing, if one of them got another
 * TensorImpl. */
bool fastopt_bump_versions(const torch_functions *t, const expected *parameters, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (parameters[i].dim >= 0 && !has_impl(t, &parameters[i].parameter)) return false;
    for (int64_t i = 0; i < count; i++)
        if (parameters[i].dim >= 0) t->bump_version(&parameters[i].parameter.impl);
    return true;
}
