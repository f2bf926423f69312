"""Checkpoints: parameters and optimizer state in one safetensors file, written atomically, verified before use.

Format version 2. Tensors: ``param.<name>``, and ``state.<index>.<key>`` for the arrays of ``opt.state_dict()``, where
index counts the parameters over all groups. The ``__metadata__`` of the file, all of it strings:

- ``format``: ``fastopt``; ``format_version``: ``2``; ``fastopt_version``: the version that wrote the file
- ``params``: JSON list of the parameter names, in their order
- ``optimizer``: JSON of ``opt.state_dict()`` without its arrays, or ``null``. A tuple is written ``{"tuple": [...]}``,
  a float that is not finite ``{"float": "inf"}``; other floats as Python writes them, which is exact.
- ``header_sha256``: over ``json.dumps([metadata so far, {tensor name: [dtype, shape]}], sort_keys=True)``
- ``sha256``: over the same with ``header_sha256`` among the metadata, then over the bytes of the tensors in the order
  of their sorted names

The number grows with everything that a build of the number before could not read: another layout, but also a new
option, state or dtype. Files of every earlier number are read; what they lack has its default. Version 1 has no
``header_sha256``, and its first builds knew no option ``capturable``.

Any safetensors reader can open such a file; nothing in it is executed on load.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from .arrays import FlatBuffer, dtype_of, placed, to_host
from .base import Optimizer
from .engine.device import Array, is_array
from .engine.exclusive import finish
from .files import check_regular, check_replaceable, replacing, safetensors_package

__all__ = ["CheckpointError", "load", "save"]

_VERSION = 2
_READABLE = ("1", "2")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names and NumPy's
_CODES = {name: code for code, name in _DTYPES.items()}
_PIECE = 2**20


class CheckpointError(ValueError):
    """A checkpoint cannot be written, is damaged, or does not fit where it is to be loaded."""


def save(
    path: str | os.PathLike[str],
    params: FlatBuffer | Mapping[str, Array] | Sequence[Array],
    opt: Optimizer | None = None,
) -> None:
    """Write parameters, and the optimizer's state and hyperparameters, to one safetensors file.

    Everything is copied first: of a fastopt optimizer, parameters and state at one moment between two steps, whatever
    other threads do. The copies are written beside ``path`` under a temporary name and synced to disk, and then the
    file is renamed: it appears whole or not at all. Whatever fails before the rename leaves an older file at ``path``
    as it was and removes the temporary one; if the process is killed, the next save into the same folder removes it.

    A symbolic link at ``path`` is followed. An older file is replaced by a new one with its permissions, and its owner
    and group where this user may give them away; its other hard links keep the old content.

    Args:
        path: File to create or replace.
        params: FlatBuffer, mapping from names to arrays, or sequence of arrays (named "0", "1", ...); float32, float64,
            float16 or bfloat16, of any shape and strides. Only read.
        opt: Optimizer whose ``state_dict()`` is saved with them, and whose options are then stored as they are computed
            with; None saves parameters only.

    Raises:
        CheckpointError: A parameter or a value of the optimizer's state cannot be stored, or not be loaded again.
        TypeError: params is or holds something else than arrays, or opt is no ``fastopt.Optimizer``.
        ImportError: The package safetensors is missing.
        OSError: The file cannot be written, or what is at ``path`` is no regular file.
        RuntimeError: Another thread is using the optimizer at this moment.

    >>> import tempfile
    >>> w, again = np.arange(3.0), np.zeros(3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder + "/model.safetensors", {"w": w})
    ...     load(folder + "/model.safetensors", {"w": again})
    >>> again.tolist()
    [0.0, 1.0, 2.0]
    """
    safetensors = safetensors_package()
    _, given = placed(params, "save: params")
    _check_optimizer(opt, "save")
    target = os.path.realpath(os.fsdecode(path))
    check_replaceable(target)
    if opt is None:
        arrays, state_dict = {name: _copy(array) for name, array in given.items()}, None
    else:
        try:
            arrays, state_dict = opt._snapshot(given, _copy)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"save: opt could not be loaded again: {error}") from error
    tensors = {f"param.{name}": array for name, array in arrays.items()}
    if state_dict is not None:
        for index, entry in state_dict["state"].items():
            tensors |= {f"state.{index}.{key}": value for key, value in entry.items() if is_array(value)}
    for name, array in tensors.items():
        if array.dtype.name not in _CODES or not array.dtype.isnative:
            raise CheckpointError(f"save: {name} is {array.dtype.str} ({array.dtype.name}), which cannot be stored.")
    metadata = {
        "format": "fastopt",
        "format_version": str(_VERSION),
        "fastopt_version": importlib.metadata.version("fastopt"),
        "params": json.dumps(list(given)),
        "optimizer": "null" if state_dict is None else _to_json(state_dict),
    }
    _seal(metadata, tensors)
    try:
        with replacing(target) as file:
            _write(file, metadata, tensors)
            with safetensors.safe_open(file.name, framework="np"):
                pass  # what cannot be opened, such as one with a header beyond 100 MB, must not replace a good file
    except (safetensors.SafetensorError, UnicodeError) as error:
        raise CheckpointError(f"save: {target} could not be written: {error}.") from error


def load(
    path: str | os.PathLike[str],
    params: FlatBuffer | Mapping[str, Array] | Sequence[Array],
    opt: Optimizer | None = None,
) -> None:
    """Read a checkpoint of ``save`` into existing parameters, in place, and into an existing optimizer.

    Names, shapes and dtypes are checked before the arrays are read, and the file is verified whole before anything is
    written: after an error parameters and optimizer are as they were. Writing comes last (``load_state_dict``, then the
    parameters); where Ctrl-C interrupts that, it is done once more before that goes on. It needs as much free memory as
    the file is large.

    Args:
        path: File written by ``save``.
        params: FlatBuffer, mapping or sequence with the names, shapes and dtypes that were saved. Overwritten.
        opt: Optimizer of the saved class over the same parameter groups; its state, step counts and hyperparameters
            are overwritten. None reads the parameters only.

    Raises:
        CheckpointError: The file is truncated, damaged, or no checkpoint that this version can read; or it holds
            other names, shapes, dtypes, or another optimizer, than asked for; or a parameter is read-only.
        TypeError: params is or holds something else than arrays, or opt is no ``fastopt.Optimizer``.
        ImportError: The package safetensors is missing, or ml_dtypes for a file that holds bfloat16.
        OSError: The file cannot be read, or is no regular file; FileNotFoundError where there is none.
        RuntimeError: Another thread is using the optimizer at this moment.
    """
    devices, targets = placed(params, "load: params")
    _check_optimizer(opt, "load")
    path = os.fsdecode(path)
    check_regular(os.stat(path), path)

    def take_over() -> None:
        if opt is not None and contents.state_dict is not None:
            opt.load_state_dict(contents.state_dict)  # before the parameters, because it may refuse
        for name, want in targets.items():
            devices[name].assign(want, contents.params[name])

    try:
        with open(path, "rb") as file:
            contents = _read_header(path, file, with_states=opt is not None)
            _check_parameters(path, contents, targets)
            if opt is not None:
                if contents.state_dict is None:
                    raise CheckpointError(f"load: {path} was saved without an optimizer, but opt was given.")
                opt._accepted(contents.state_dict, f"{type(opt).__name__}.load_state_dict")
            _read_tensors(path, file, contents)
        finish(take_over)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"load: {path} does not fit opt: {error}") from error


def _check_optimizer(opt: object, where: str) -> None:
    if opt is not None and not isinstance(opt, Optimizer):
        kind = f"{type(opt).__module__}.{type(opt).__qualname__}"
        raise TypeError(f"{where}: opt is a {kind}; needed is a fastopt.Optimizer. For torch's there is torch.save.")


# --- what is saved -----------------------------------------------------------------------------------------------


def _copy(array: Array) -> Array:
    """A C-contiguous copy in host memory."""
    return np.array(array, order="C") if isinstance(array, np.ndarray) else np.asarray(to_host(array), order="C")


def _write(file: IO[bytes], metadata: Mapping[str, str], tensors: Mapping[str, Array]) -> None:
    """A safetensors file: length of the header, header, tensors without gaps, aligned to their dtypes."""
    header: dict[str, Any] = {"__metadata__": metadata}
    ordered = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    end = 0
    for name in ordered:
        start, end = end, end + tensors[name].nbytes
        code, shape = _CODES[tensors[name].dtype.name], list(tensors[name].shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in ordered:
        file.write(_bytes(tensors[name]))
    file.flush()


# --- reading -----------------------------------------------------------------------------------------------------


class _Contents(NamedTuple):
    """What the header of a file says."""

    metadata: dict[str, str]
    layout: dict[str, tuple[str, tuple[int, ...]]]
    """Of each tensor dtype and shape."""
    starts: dict[str, int]
    """Where its bytes begin."""
    params: dict[str, Any]
    """The parameters, None until they are read."""
    state_dict: dict[str, Any] | None
    """Its arrays take no memory until they are read."""
    places: dict[str, tuple[dict[Any, Any], Any]]
    """Of each tensor that is wanted a dict and the key in it."""


def _read_header(path: str, file: IO[bytes], *, with_states: bool) -> _Contents:
    """The header of a fastopt checkpoint; it is not yet known to be undamaged."""
    safetensors = safetensors_package()
    try:
        with safetensors.safe_open(path, framework="np"):  # looks at the whole header, and at the size of the file
            pass
        data = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(data - 8))
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"load: {path} is truncated, corrupted, or no safetensors file ({error}); a file written by save is needed."
        ) from error
    metadata: dict[str, str] = header.pop("__metadata__", None) or {}
    if metadata.get("format") != "fastopt":
        raise CheckpointError(f"load: {path} is no fastopt checkpoint, but another safetensors file.")
    version = metadata.get("format_version", "")
    if version not in _READABLE:
        writer = metadata.get("fastopt_version", "unknown")
        raise CheckpointError(
            f"load: {path} has format version {version!r} (fastopt {writer}), but only {', '.join(_READABLE)} can be "
            "read here."
        )
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(f"load: {path} is corrupted: {name} is {entry['dtype']}, which save never writes.")
    layout = {name: (_DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in header.items()}
    sealed = {key: value for key, value in metadata.items() if key not in ("sha256", "header_sha256")}
    if version != "1" and metadata.get("header_sha256") != hashlib.sha256(_described(sealed, layout)).hexdigest():
        raise CheckpointError(f"load: {path} is corrupted: its checksum does not match its content.")
    try:  # a right checksum may be over other content
        state_dict, params = _from_json(metadata["optimizer"]), dict.fromkeys(json.loads(metadata["params"]))
        places = {f"param.{name}": (params, name) for name in params}
        for name, (dtype, shape) in layout.items():
            if with_states and state_dict is not None and name.startswith("state."):
                _, index, key = name.split(".", 2)
                entry = state_dict["state"][int(index)]
                entry[key] = np.ndarray(shape, _dtype(dtype), bytes(8), strides=(0,) * len(shape))
                places[name] = entry, key
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"load: {path} is no complete fastopt checkpoint ({error!r}).") from error
    for name in places.keys() - header.keys():
        raise CheckpointError(f"load: {path} is no complete fastopt checkpoint (it lacks {name}).")
    starts = {name: data + entry["data_offsets"][0] for name, entry in header.items()}
    return _Contents(metadata, layout, starts, params, state_dict, places)


def _check_parameters(path: str, contents: _Contents, targets: Mapping[str, Array]) -> None:
    """Refuse other names, shapes and dtypes than those of the parameters."""
    for name in [*targets, *contents.params]:
        if name not in contents.params:
            raise CheckpointError(f"load: {path} has no parameter {name!r}, which params has.")
        if name not in targets:
            raise CheckpointError(f"load: {path} holds parameter {name!r}, which params does not have.")
        (dtype, shape), want = contents.layout[f"param.{name}"], targets[name]
        if shape != want.shape:
            raise CheckpointError(f"load: {path} holds {name!r} of shape {shape}, but params has {want.shape}.")
        if dtype != want.dtype.name or not want.dtype.isnative:
            raise CheckpointError(f"load: {path} holds {name!r} as {dtype}, but params has {want.dtype}.")
        if isinstance(want, np.ndarray) and not want.flags.writeable:
            raise CheckpointError(f"load: params[{name!r}] is read-only; a writable array is needed.")


def _read_tensors(path: str, file: IO[bytes], contents: _Contents) -> None:
    """Put tensors into their places, with the checksum of the whole file verified."""
    expected = contents.metadata.pop("sha256", None)
    digest = hashlib.sha256(_described(contents.metadata, contents.layout))
    for name, (dtype, shape) in sorted(contents.layout.items()):
        file.seek(contents.starts[name])
        kind = _dtype(dtype)
        if name in contents.places:
            array = np.empty(shape, kind)
            if file.readinto(_bytes(array)) != array.nbytes:  # type: ignore[attr-defined]
                break  # it became shorter just now
            digest.update(_bytes(array))
            target, key = contents.places[name]
            target[key] = array
        else:
            left = math.prod(shape) * kind.itemsize
            while left > 0 and (piece := file.read(min(left, _PIECE))):
                digest.update(piece)
                left -= len(piece)
    if expected != digest.hexdigest():
        raise CheckpointError(f"load: {path} is corrupted: its checksum does not match its content.")


# --- the form of the file ----------------------------------------------------------------------------------------


def _described(metadata: Mapping[str, str], layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    return json.dumps([dict(metadata), layout], sort_keys=True).encode()


def _seal(metadata: dict[str, str], tensors: Mapping[str, Array]) -> None:
    """Add the checksums."""
    layout = {name: (tensor.dtype.name, tensor.shape) for name, tensor in tensors.items()}
    metadata["header_sha256"] = hashlib.sha256(_described(metadata, layout)).hexdigest()
    digest = hashlib.sha256(_described(metadata, layout))
    for name in sorted(tensors):
        digest.update(_bytes(tensors[name]))
    metadata["sha256"] = digest.hexdigest()


@functools.cache
def _dtype(name: str) -> np.dtype[Any]:
    return dtype_of(name, "load")


def _bytes(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _to_json(state_dict: Mapping[str, Any]) -> str:
    """A state dict without its arrays."""

    def tagged(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": repr(value)}
        return {"tuple": [*map(tagged, value)]} if isinstance(value, tuple) else value

    def refuse(value: Any) -> None:
        raise CheckpointError(f"save: opt.state_dict() holds {value!r}, which cannot be stored.")

    states = {i: {k: x for k, x in entry.items() if not is_array(x)} for i, entry in state_dict["state"].items()}
    groups = [{name: tagged(value) for name, value in group.items()} for group in state_dict["param_groups"]]
    return json.dumps({**state_dict, "state": states, "param_groups": groups}, default=refuse)


def _from_json(text: str) -> dict[str, Any] | None:
    """The state dict that ``_to_json`` was given, without its arrays; None for a file without one."""

    def untagged(tagged: dict[str, Any]) -> Any:
        if tagged.keys() == {"tuple"}:
            return tuple(tagged["tuple"])
        return float(tagged["float"]) if tagged.keys() == {"float"} else tagged

    head: dict[str, Any] | None = json.loads(text, object_hook=untagged)
    if head is not None:
        head["state"] = {int(index): entry for index, entry in head["state"].items()}
    return head
