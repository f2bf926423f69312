"""The bytes that Python and C share. CMake has this module write them as a C header."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

WORD = 8
"""Bytes of a word."""

CHUNK = 16_384
"""Elements per chunk. The sums of squares are defined by it (reductions.py): changing it changes bits."""

LANES, ROWS = 32, 64
BLOCK = LANES * ROWS
"""A block of elements whose squares are summed together (reductions.py)."""

PARAMETER, GRADIENT = 0, 1
"""Places in "squares" and, without terms, "sums" of a segment, and the first two in "arrays"; states follow."""

MULTIPLIER, RATIO = 0, 1
"""Places in "own" of a segment: gradient multiplier, trust ratio."""

SUMS = 4
"""Sums of products that a segment has room for."""

KNOW_W, KNOW_G, KEEP_W = 1 << PARAMETER, 1 << GRADIENT, 4
"""Flags: the squares of the parameters, or of the gradients, are known; those of the new parameters are kept."""

UPDATE, NORM, SUM, DECIDE, WAVES = range(5)
"""What a team does with a table: update every chunk; sum squares of one array of every segment; form the sums that
ratios need; form the ratios; the last two and the update wave after wave."""

EPILOGUES = 2
"""Epilogues that a segment has room for."""

STRIP = 256
"""Elements that are updated before epilogues follow; BLOCK before zeros, and where sums of squares are kept. AdamW with
an average against without, 16 M float32, 1 thread, CPU time: 1.24 (128: 1.24, 512: 1.30, 2048: 1.43; bytes: 1.29)."""

NAMES = (
    *("LANES", "BLOCK", "PARAMETER", "GRADIENT", "MULTIPLIER", "RATIO"),
    *("KNOW_W", "KNOW_G", "SUMS", "EPILOGUES", "STRIP"),
)
"""What a library must have been built with, beside the structures."""

STRUCTURES: dict[str, dict[str, str | tuple[str, int]]] = {
    # What an update kernel is called with, beside its own numbers. For an epilogue the parameter is the gradient.
    "epilogue": {"update": "void *", "scalars": "const double *", "arrays": ("void *", 2)},
    # A run of elements that share kernels and scalars. It begins as an epilogue does.
    "segment": {
        "update": "void *",
        "scalars": "const double *",
        "arrays": ("void *", 8),  # parameter, gradient, states
        "own": ("double", 2),
        "zeroed": "int64_t",  # bytes of an element of the gradient where that is to be zeroed, else 0
        "epilogues": ("epilogue", EPILOGUES),  # the first whose kernel is NULL ends them
        "terms": "void *",  # NULL where the ratio needs sums of squares of what is stored, and no others
        "ratio": "void *",  # NULL where the segment has no trust ratio
        "squares": ("void *", 2),  # of parameters and gradients
        "sums": ("double", SUMS),  # of squares of parameter and gradient as stored, or what terms gives
    },
    "chunk": {"segment": "int64_t", "lo": "int64_t", "hi": "int64_t"},
    # Waves follow one another: where each begins, and its elements.
    "wave": {"segments": "int64_t", "chunks": "int64_t", "elements": "int64_t"},
    # What the threads of one call share (schedule.py).
    "table": {
        "segments": "void *",
        "segment_count": "int64_t",
        "chunks": "void *",
        "chunk_count": "int64_t",
        "waves": "void *",
        "wave_count": "int64_t",
        "partials": "double *",  # a row of sums for each chunk
        "counts": "double *",
        "half": "int64_t",
        "next": "int64_t",  # the chunk that nobody has taken yet
        "total": "double",
        "unit": ("double", 2),  # the numbers that epilogues have in the place of "own"
        "lanes": ("double", LANES),
    },
    # What a NumPy array has behind Python's own fields, and arrays that are looked at again: arrays.c.
    "array": {
        "data": "const void *",
        "nd": "int32_t",
        "shape": "const intptr_t *",
        "strides": "const void *",
        "base": "const void *",
        "dtype": "const void *",
        "flags": "int32_t",  # writable, contiguous, aligned
    },
    # Where the shape was last is fetched early, and never followed.
    "watched": {"object": "const char *", "type": "const void *", "shape": "const void *"},
    "watch": {
        "get_item": "void *(*{})(void *list, intptr_t i)",  # PyList_GetItem
        "listed": "const void *const *",  # what the list must hold
        "arrays": "watched *",
        "listed_count": "int64_t",
        "count": "int64_t",
        "head": "int64_t",  # bytes of Python's own fields; the type is the last of them
        "seen": "uint64_t",
    },
    # What tensors are asked through, of torch's stable C interface, where a tensor is the address of an at::Tensor;
    # fastopt/torch/_interface.py finds it.
    "torch_functions": {
        "get_data_ptr": "int32_t (*{})(void *tensor, void **data)",
        "get_dim": "int32_t (*{})(void *tensor, int64_t *number)",
        "get_sizes": "int32_t (*{})(void *tensor, int64_t **numbers)",
        "get_strides": "int32_t (*{})(void *tensor, int64_t **numbers)",
        "get_dtype": "int32_t (*{})(void *tensor, int32_t *code)",
        "get_layout": "int32_t (*{})(void *tensor, int32_t *code)",
        "get_device_type": "int32_t (*{})(void *tensor, int32_t *code)",
        "get_device_index": "int32_t (*{})(void *tensor, int32_t *code)",
        "is_defined": "int32_t (*{})(void *tensor, bool *answer)",
        "new_tensor_handle": "int32_t (*{})(void *tensor, void **data)",
        "delete_tensor_object": "int32_t (*{})(void *tensor)",
        "grad": "void *(*{})(const void *impl)",  # c10::TensorImpl::grad, which returns the address of an at::Tensor
        "bump_version": "void (*{})(const void *tensor)",  # of torch::autograd::impl; it throws for inference tensors
        "device_type": "int64_t",  # where all must be; the CPU has no index
        "device_index": "int64_t",
        "impl_at": "int64_t",  # where a Python object of class Tensor has the address of its TensorImpl
    },
    # A tensor as it was when the plan was made (tensors.c): its Python object, which lives as long as the plan; the
    # TensorImpl that the object had, which may be another one now; where its elements began; its StorageImpl, to be
    # fetched early and never followed: of memory that may be gone nothing is read.
    "known": {"object": "const char *", "impl": "void *", "data": "void *", "storage": "const void *"},
    # Tensors that a step writes beside the parameters.
    "states": {"tensors": "const known *", "count": "int64_t"},
    # A parameter as it was when the plan was made, and the gradient that it must have.
    "expected": {
        "parameter": "known",
        "sizes": "const int64_t *",  # of both
        "strides": "const int64_t *",
        "dim": "int64_t",  # -1 for a parameter that must have no gradient
        "nbytes": "int64_t",  # of the gradient
        "before": "int64_t",  # as many runs begin before the end of the gradient
        "dtype": "int32_t",
        "gradient_dtype": "int32_t",
        "holder": "const void *",  # where the gradient was last, to be fetched early and never followed
        "gradient": "const void *",
        "gradient_storage": "const void *",
    },
    # Runs of memory that a step writes, sorted and apart: where each begins, and the byte after its last.
    "runs": {"begin": "const uintptr_t *", "end": "const uintptr_t *", "count": "int64_t"},
}
"""Fields and their C types, with a number of elements where there are several, or a place for a function's name."""

_NUMBERS: dict[str, Any] = {"int64_t": np.int64, "uint64_t": np.uint64, "int32_t": np.int32, "double": np.float64}


def structure(name: str) -> np.dtype[Any]:
    """The NumPy dtype with the bytes of a structure; an address is a uint64."""

    def of(kind: str | tuple[str, int]) -> Any:
        if isinstance(kind, tuple):
            return np.dtype((of(kind[0]), kind[1]))
        return structure(kind) if kind in STRUCTURES else _NUMBERS.get(kind, np.uint64)

    return np.dtype([(field, of(kind)) for field, kind in STRUCTURES[name].items()], align=True)


SEGMENT = structure("segment")


def places(name: str) -> tuple[int, ...]:
    """Where the fields of a structure begin, counted in words."""
    return tuple(at[1] // WORD for at in (structure(name).fields or {}).values())


def _declaration(field: str, kind: str | tuple[str, int]) -> str:
    """A field in C."""
    if isinstance(kind, tuple):
        return f"{kind[0]} {field}[{kind[1]}];"
    return f"{kind.format(field)};" if "{}" in kind else f"{kind} {field};"


def header() -> str:
    """All of this in C."""
    lines = ["/* Written by kernels/layout.py. */", "#include <stdbool.h>", "#include <stdint.h>"]
    lines += [f"enum {{ {', '.join(f'{name} = {globals()[name]}' for name in NAMES)} }};"]
    for name, fields in STRUCTURES.items():
        lines += ["typedef struct {", *(_declaration(*field) for field in fields.items()), f"}} {name};"]
    text = "\n".join(lines) + "\n"
    return f"{text}enum {{ FASTOPT_LAYOUT = {zlib.crc32(text.encode()) >> 1} }};\n"


def layout_hash() -> int:
    """The number that stands at the end of the header, and in a library that was built with it."""
    return int(header().rsplit("=", 1)[1].split()[0])


# --- on a GPU: tables of 64-bit words --------------------------------------------------------------------------------

SCALAR_GROUP, SIGN, ADAPTS, G_CODE, FIRST_CHUNK, CHUNKS, SHIFT, DONE, SQUARES, FACTORS = range(8, 18)
TARGETS = FACTORS + 2
SEGMENT_WORDS = TARGETS + 4
"""A segment there: its addresses as in "arrays" (that of the gradient is in a list of its own), then these words.
FIRST_CHUNK and CHUNKS say where the sums of its chunks are, of those of other processes, too; those of the chunks here
are SHIFT further on than the chunks are in the table. DONE are chunks whose sums are taken, 0 between launches; SQUARES
the sum of the gradient's squares, and from FACTORS on what the ratio splits into (rule.py), in float64. From TARGETS on
are the addresses of the targets of all kinds of epilogues (epilogues.py), 0 for those that it has not."""

STEPS, RULE, LR, LR_BYTES, AVERAGED, CARRY = range(6)
SCALAR_GROUP_WORDS = 9
"""A scalar group: steps taken, number of its rule, address and itemsize of an lr that lives on the device (or 0),
averagings taken, the numbers that the rule carries."""

MULTIPLIER64, SKIP, ALL_DONE = range(3)
HEADER_WORDS = 4
"""What all blocks read first: the gradient multiplier (float64), whether the step is skipped, and chunks of segments
whose sums are complete, 0 between launches. The numbers of all scalar groups follow."""

SCALARS = 16
WEIGHT = 15
"""Scalars of a scalar group: those of its rule, and at this place the weight of the average."""

OPTIONS = 24
DECAY, WARMUP = 22, 23
"""Options from which a GPU forms them: those of the rule, and at these places those of the average."""

NUMBERS = SCALARS + OPTIONS
"""Both of a scalar group, on a GPU, in float64."""

PARTS_BITS = 2
"""A chunk is shared by 2^PARTS_BITS blocks of threads in the update."""

THREADS = 256
"""Threads per block of every kernel; the prologue's order of addition is laid out for it."""

if __name__ == "__main__":
    Path(sys.argv[1]).write_text(header())
