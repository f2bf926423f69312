"""What plans need to know of tensors: storage dtype, whether elements lie densely, the real numbers in complex ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, from_numpy
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from ..kernels.dtypes import COMPUTE, ITEMSIZE, PAIRS


class Stored(NamedTuple):
    """A storage dtype as plans know it: NumPy's bfloat16 would need another package."""

    name: str
    itemsize: int


STORED = {getattr(torch, name): Stored(name, size) for name, size in ITEMSIZE.items()}
"""The dtypes that kernels compute."""

COMPUTED = {dtype: getattr(torch, COMPUTE[stored.name]) for dtype, stored in STORED.items()}
"""Storage dtype to that of the states."""

GRADIENTS = {p: {g for g in STORED if (STORED[p].name, STORED[g].name) in PAIRS} for p in STORED}
"""Parameter dtype to the dtypes of gradients that its kernels read."""

FLOATING = frozenset({*STORED, torch.complex64, torch.complex128})
"""The dtypes of parameters."""

PLAIN = frozenset({Tensor, torch.nn.Parameter})
"""Types whose memory is what it seems."""


def local(tensor: Tensor, where: str) -> Tensor:
    """The tensor itself, or the part of a distributed one that this process holds."""
    if type(tensor) in PLAIN:
        return tensor
    held = getattr(tensor, "_local_tensor", None)
    if isinstance(held, Tensor):
        wait = getattr(held, "wait", None)  # the result of a collective that may still be under way
        return wait() if wait is not None else held
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(f"{where} is a {type(tensor).__name__}, whose memory fastopt does not know how to reach.")
    with torch._C.DisableTorchFunctionSubclass():  # a subclass that only adds to Tensor: what it adds is not asked
        return tensor.as_subclass(Tensor)


def real(tensor: Tensor) -> Tensor:
    """The tensor itself, or the real and imaginary parts of a complex one."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether equal places in two tensors of one shape are equally far from where each begins."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def part_of(flat: Any, begin: int, end: int, layout: tuple[Any, ...]) -> Tensor:
    """Elements of a flat tensor, or array of NumPy, as a tensor that lies so, with a storage that covers no more."""
    shape, strides, _ = layout
    part: Tensor = from_dlpack(to_dlpack(flat[begin:end])) if isinstance(flat, Tensor) else from_numpy(flat[begin:end])
    return part if part.shape == shape else part.as_strided(shape, strides, 0)


def layout_of(memory: Tensor) -> tuple[Any, ...]:
    """How a tensor lies in memory."""
    return memory.shape, memory.stride(), memory.dtype


def address_of(tensor: Tensor) -> int:
    """Where the elements of a tensor, or of this process's part of it, begin."""
    return (tensor if type(tensor) in PLAIN else local(tensor, "a state")).data_ptr()


def shaped_like(parameter: Tensor, part: Tensor) -> Tensor:
    """A real tensor that lies like a parameter's memory, as ``state`` shows it: complex or distributed, as that is."""
    view = torch.view_as_complex(part) if parameter.is_complex() else part
    if type(parameter) in PLAIN or not hasattr(parameter, "device_mesh"):
        return view
    placed: Any = parameter
    where = placed.device_mesh, placed.placements
    made: Tensor = placed.from_local(view, *where, run_check=False, shape=placed.shape, stride=placed.stride())
    return made


def state_address(value: Any, memory: Tensor, where: str) -> int:
    """Where a state begins that lies like the real tensor of its parameter, or an error."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where} is a {type(value).__name__}; needed is a tensor.")
    dtype = COMPUTED[memory.dtype]
    if type(value) is Tensor and is_like(value, memory) and dtype == memory.dtype:
        return value.data_ptr()
    part = _real_part(value, where)
    if part.shape != memory.shape:
        raise ValueError(f"{where} has shape {tuple(part.shape)}, but the parameter has shape {tuple(memory.shape)}.")
    if part.dtype != dtype or part.device != memory.device:
        raise TypeError(
            f"{where} is {part.dtype} on {part.device}; needed is {dtype} on {memory.device}. Convert it with "
            f".to({str(memory.device)!r}, {dtype})."
        )
    if not same_layout(part, memory):
        raise ValueError(
            f"{where} does not lie in memory as its parameter does, whose strides are {memory.stride()}. Copy it into "
            "torch.zeros_like of the parameter."
        )
    return part.data_ptr()


def is_usual(tensor: Tensor) -> bool:
    """Whether a parameter is on the CPU, contiguous, and nothing else needs to be asked, as of nearly all."""
    usual = type(tensor) in PLAIN and tensor.is_cpu and tensor.dtype in STORED and tensor.layout is torch.strided
    return usual and tensor.is_contiguous() and not tensor.is_neg()


def parameter_memory(tensor: Tensor, where: str) -> Tensor:
    """The real tensor that a step writes for a parameter, which may be that itself, or an error."""
    if is_usual(tensor):
        return tensor
    memory = _real_part(tensor, where)
    if memory.device.type not in ("cpu", "cuda"):
        raise NotImplementedError(
            f"{where} is on {memory.device}; fastopt.torch steps tensors on the CPU and on NVIDIA's GPUs."
        )
    if memory.dtype not in STORED:
        raise TypeError(f"{where} is {memory.dtype}; needed is float32, float64, float16, bfloat16 or a complex dtype.")
    if not (memory.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(memory)):
        raise ValueError(
            f"{where} has strides {tensor.stride()} for shape {tuple(tensor.shape)}: elements overlap or leave gaps. "
            "Pass a contiguous (or channels_last, or transposed) tensor."
        )
    return memory


def _real_part(tensor: Tensor, where: str) -> Tensor:
    """The real tensor in which the elements of this process lie, or an error where they do not lie as they seem to."""
    part = local(tensor, where).detach()  # detaching a distributed tensor takes ten times as long
    if part.layout is not torch.strided:
        raise TypeError(f"{where} has the layout {part.layout}; needed is a dense (strided) tensor.")
    if part.is_conj() or part.is_neg():
        raise ValueError(f"{where} is a lazily conjugated or negated view; pass a copy made with .clone().")
    return real(part) if part.dtype in FLOATING else part


def is_like(tensor: Tensor, memory: Tensor) -> bool:
    """Whether a gradient lies like its parameter, and nothing else needs to be asked, as of nearly all."""
    return (
        type(tensor) in PLAIN
        and tensor.layout is torch.strided
        and tensor.dtype == memory.dtype
        and tensor.device == memory.device
        and tensor.shape == memory.shape
        and tensor.stride() == memory.stride()
        and not (tensor.is_neg() or tensor._is_zerotensor())
    )


def gradient_memory(
    gradient: Any, parameter: Tensor, memory: Tensor, has_master: bool, where: str, name: str
) -> Tensor:
    """A gradient as a real tensor in the layout of its parameter's memory: itself, or a copy where it must be.

    A distributed one is moved or summed up over processes until it is placed as its parameter. A parameter with a
    float32 master may have a gradient of float32, too.
    """
    placements = getattr(parameter, "placements", None)
    if placements is not None and getattr(gradient, "placements", placements) != placements:
        gradient = gradient.redistribute(placements=placements)
    held = local(gradient, name)
    if is_like(held, memory):
        return held
    if held.layout is not torch.strided:
        hint = ", please consider SparseAdam instead" if where == "Adam" else ""
        raise RuntimeError(f"{where} does not support sparse gradients{hint}: that of {name} is one.")
    held = held.detach()
    if held.device != memory.device:
        raise ValueError(f"{where}: {name} is on {memory.device}, but its gradient is on {held.device}.")
    if held._is_zerotensor():  # which has no memory
        held = held.clone()
    held = real(held.resolve_conj()).resolve_neg()
    if held.shape != memory.shape:
        raise ValueError(
            f"{where}: {name} has shape {tuple(memory.shape)}, but its gradient has shape {tuple(held.shape)}."
        )
    if held.dtype not in GRADIENTS[torch.float32 if has_master else memory.dtype]:
        held = held.to(memory.dtype)
    if same_layout(held, memory):
        return held
    return torch.empty_strided(memory.shape, memory.stride(), dtype=held.dtype, device=held.device).copy_(held)
