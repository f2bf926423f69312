"""Checkpoints: parameters and optimizer state in one safetensors file, written atomically, verified before use.

Format version 1. Tensors: ``param.<name>``, and ``state.<index>.<key>`` for the arrays of ``opt.state_dict()``, where
index counts the parameters over all groups. The ``__metadata__`` of the file, all of it strings:

- ``format``: ``fastopt``; ``format_version``: ``1``; ``fastopt_version``: the version that wrote the file
- ``params``: JSON list of the parameter names, in their order
- ``optimizer``: JSON of ``opt.state_dict()`` without its arrays, or ``null``. A tuple is written ``{"tuple": [...]}``,
  a float that is not finite ``{"float": "inf"}``; other floats as Python writes them, which is exact.
- ``sha256``: over ``json.dumps([metadata without sha256, {tensor name: [dtype, shape]}], sort_keys=True)``, then the
  bytes of the tensors in the order of their sorted names

Any safetensors reader can open such a file; nothing in it is executed on load.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from . import __version__
from ._arrays import Array, dtype_of, is_array, space_of, to_host

if TYPE_CHECKING:
    from .flat import FlatBuffer

__all__ = ["CheckpointError", "load", "save"]

_VERSION = 1
# What a file may hold: safetensors' names and NumPy's. Integers are for states of few bits.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class CheckpointError(ValueError):
    """A checkpoint cannot be written, is damaged, or does not fit where it is to be loaded."""


class _Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


def save(
    path: str | os.PathLike[str],
    params: FlatBuffer | Mapping[str, Array] | Sequence[Array],
    opt: _Stateful | None = None,
) -> None:
    """Write parameters, and the optimizer's state and hyperparameters, to one safetensors file.

    The file appears whole or not at all: it is written beside ``path`` under a temporary name, synced to disk, and then
    renamed. Whatever fails before the rename leaves an older file at ``path`` as it was and removes the temporary one.
    A symbolic link at ``path`` is followed.

    Args:
        path: File to create or replace.
        params: FlatBuffer, mapping from names to arrays, or sequence of arrays (named "0", "1", ...); float32, float64,
            float16 or bfloat16, of any shape and strides. Only read.
        opt: Optimizer whose ``state_dict()`` is saved with them; None saves parameters only.

    Raises:
        CheckpointError: A parameter or a value of the optimizer's state cannot be stored, or safetensors failed to.
        TypeError: params is or holds something else than arrays.
        ImportError: The package safetensors is missing.
        OSError: The file cannot be written.

    >>> import tempfile
    >>> w, again = np.arange(3.0), np.zeros(3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder + "/model.safetensors", {"w": w})
    ...     load(folder + "/model.safetensors", {"w": again})
    >>> again.tolist()
    [0.0, 1.0, 2.0]
    """
    safetensors = _safetensors()
    named = _named_arrays("save", params)
    tensors = {f"param.{name}": to_host(array) for name, array in named.items()}
    state_dict = None
    if opt is not None:
        state_dict = opt.state_dict()
        for index, entry in state_dict["state"].items():
            tensors |= {f"state.{index}.{key}": to_host(value) for key, value in entry.items() if is_array(value)}
    for name, array in tensors.items():
        if array.dtype.name not in _DTYPES.values() or not array.dtype.isnative:
            raise CheckpointError(f"save: {name} is {array.dtype.str} ({array.dtype.name}), which cannot be stored.")
    tensors = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    metadata = {
        "format": "fastopt",
        "format_version": str(_VERSION),
        "fastopt_version": __version__,
        "params": json.dumps(list(named)),
        "optimizer": "null" if state_dict is None else _to_json(state_dict),
    }
    metadata["sha256"] = _digest(metadata, tensors)

    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), folder)
    temporary = os.path.join(folder, f".fastopt-{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb"):
            mode = stat.S_IMODE(os.stat(temporary).st_mode)  # of a new file of this user; safetensors makes it 0600
        safetensors.numpy.save_file(tensors, temporary, metadata=metadata)
        os.chmod(temporary, mode)
        _sync(temporary)
        with safetensors.safe_open(temporary, framework="np"):
            pass  # what cannot be opened, such as one with a header beyond 100 MB, must not replace a good file
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, (safetensors.SafetensorError, UnicodeError)):
            raise CheckpointError(f"save: {target} could not be written: {error}.") from error
        raise
    try:
        _sync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise


def load(
    path: str | os.PathLike[str],
    params: FlatBuffer | Mapping[str, Array] | Sequence[Array],
    opt: _Stateful | None = None,
) -> None:
    """Read a checkpoint of ``save`` into existing parameters, in place, and into an existing optimizer.

    The file is read and verified whole, and everything is checked to fit, before anything is written: after an error
    parameters and optimizer are as they were. It needs as much free memory as the file is large.

    Args:
        path: File written by ``save``.
        params: FlatBuffer, mapping or sequence with the names, shapes and dtypes that were saved. Overwritten.
        opt: Optimizer of the saved class over the same parameter groups; its state, step counts and hyperparameters
            are overwritten. None reads the parameters only.

    Raises:
        CheckpointError: The file is truncated, damaged, or no checkpoint that this version can read; or it holds
            other names, shapes, dtypes, or another optimizer, than asked for; or a parameter is read-only.
        TypeError: params is or holds something else than arrays.
        ImportError: The package safetensors is missing, or ml_dtypes for a file that holds bfloat16.
        OSError: The file cannot be read; FileNotFoundError where there is none.
    """
    targets = _named_arrays("load", params)
    path = os.fsdecode(path)
    metadata, tensors = _read(path)
    try:
        stored = {name: tensors[f"param.{name}"] for name in json.loads(metadata["params"])}
        state_dict = _from_json(metadata["optimizer"], tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # a right checksum over other content
        raise CheckpointError(f"load: {path} is no complete fastopt checkpoint ({error!r}).") from error

    for name in [*targets, *stored]:
        if name not in stored:
            raise CheckpointError(f"load: {path} has no parameter {name!r}, which params has.")
        if name not in targets:
            raise CheckpointError(f"load: {path} holds parameter {name!r}, which params does not have.")
        have, want = stored[name], targets[name]
        if have.shape != want.shape:
            raise CheckpointError(f"load: {path} holds {name!r} of shape {have.shape}, but params has {want.shape}.")
        if have.dtype != want.dtype:
            raise CheckpointError(f"load: {path} holds {name!r} as {have.dtype}, but params has {want.dtype}.")
        if isinstance(want, np.ndarray) and not want.flags.writeable:
            raise CheckpointError(f"load: params[{name!r}] is read-only; a writable array is needed.")
    if opt is not None:
        if state_dict is None:
            raise CheckpointError(f"load: {path} was saved without an optimizer, but opt was given.")
        try:
            opt.load_state_dict(state_dict)  # before the parameters, because it may refuse
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"load: {path} does not fit opt: {error}") from error
    for name, want in targets.items():
        space_of(want, f"load: params[{name!r}]").assign(want, stored[name])


def _read(path: str) -> tuple[dict[str, str], dict[str, Array]]:
    """Metadata and copies of all tensors of a fastopt checkpoint, with their checksum verified."""
    safetensors = _safetensors()
    with open(path, "rb"):
        pass  # Python's own errors for a file that is missing, a folder, or unreadable
    tensors = {}
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("format") != "fastopt":
                raise CheckpointError(f"load: {path} is no fastopt checkpoint, but another safetensors file.")
            version = metadata.get("format_version", "")
            if version != str(_VERSION):
                writer = metadata.get("fastopt_version", "unknown")
                raise CheckpointError(
                    f"load: {path} has format version {version!r} (fastopt {writer}); only {_VERSION} can be read here."
                )
            for name in file.keys():  # noqa: SIM118 (not a dict)
                dtype = file.get_slice(name).get_dtype()
                if dtype not in _DTYPES:
                    raise CheckpointError(f"load: {path} is corrupted: {name} is {dtype}, which save never writes.")
                if dtype == "BF16":
                    dtype_of("bfloat16", f"load: {path}")  # its import of ml_dtypes tells NumPy what bfloat16 is
                tensors[name] = file.get_tensor(name)
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"load: {path} is truncated, corrupted, or no safetensors file ({error}); a file written by save is needed."
        ) from error
    if metadata.pop("sha256", None) != _digest(metadata, tensors):
        raise CheckpointError(f"load: {path} is corrupted: its checksum does not match its content.")
    return metadata, tensors


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Array]) -> str:
    layout = {name: [tensor.dtype.name, tensor.shape] for name, tensor in tensors.items()}
    digest = hashlib.sha256(json.dumps([dict(metadata), layout], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _to_json(state_dict: Mapping[str, Any]) -> str:
    """A state dict without its arrays."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": repr(float(value))}
        if isinstance(value, tuple):
            return {"tuple": [plain(item) for item in value]}
        if isinstance(value, list):
            return [plain(item) for item in value]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise CheckpointError(f"save: opt.state_dict() holds {value!r}, which cannot be stored.")

    def entries(mapping: Mapping[Any, Any]) -> dict[str, Any]:
        return {str(key): plain(value) for key, value in mapping.items() if not is_array(value)}

    head = entries({key: value for key, value in state_dict.items() if key not in ("state", "param_groups")})
    head["state"] = {str(index): entries(entry) for index, entry in state_dict["state"].items()}
    head["param_groups"] = [entries(group) for group in state_dict["param_groups"]]
    return json.dumps(head)


def _from_json(text: str, tensors: Mapping[str, Array]) -> dict[str, Any] | None:
    """The state dict that ``_to_json`` was given, its arrays taken from the tensors; None for a file without one."""

    def untagged(tagged: dict[str, Any]) -> Any:
        if tagged.keys() == {"tuple"}:
            return tuple(tagged["tuple"])
        return float(tagged["float"]) if tagged.keys() == {"float"} else tagged

    head: dict[str, Any] | None = json.loads(text, object_hook=untagged)
    if head is None:
        return None
    head["state"] = {int(index): entry for index, entry in head["state"].items()}
    for name, tensor in tensors.items():
        if name.startswith("state."):
            _, index, key = name.split(".", 2)
            head["state"][int(index)][key] = tensor
    return head


def _named_arrays(function: str, params: Any) -> dict[str, Array]:
    """The arrays of a mapping (such as FlatBuffer) or sequence, by name."""
    if isinstance(params, Sequence) and not isinstance(params, (str, bytes)):
        params = {str(index): array for index, array in enumerate(params)}
    if not isinstance(params, Mapping):
        raise TypeError(f"{function}: params must be a FlatBuffer, mapping or sequence, got {type(params).__name__}.")
    for name, array in params.items():
        if not isinstance(name, str):
            raise TypeError(f"{function}: the names of params must be strings, got {name!r}.")
        space_of(array, f"{function}: params[{name!r}]").array(array, f"{function}: params[{name!r}]")
    return dict(params)


def _sync(path: str) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError('Checkpoints need the package safetensors: pip install "fastopt[checkpoint]"') from error
    return safetensors
