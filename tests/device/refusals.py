"""What a GPU refuses: tensors of two devices in one operator, and operators that only the CPU has.

The messages are PyTorch's own, so that a test reads as on a machine with a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Copies between devices, and what takes the tensor of another device by its contract.
CROSSING = {"copy_", "_to_copy", "copy"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# Operators without the tag `pointwise` that take a CPU tensor without dimensions all the same.
SCALAR_TOO = {"fill_", "fill", "masked_fill", "masked_fill_", "index_fill", "index_fill_", "where", "clamp", "lerp"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "addmm_", "baddbmm_"}


def check(
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    on_device: Callable[[Tensor], bool],
    device: torch.device,
    tensors: Sequence[Tensor],
) -> None:
    """Refuses a call as CUDA does.

    Args:
        func: The operator.
        args: Its arguments.
        kwargs: Those by name.
        on_device: Tells whether a tensor is on the GPU.
        device: The GPU.
        tensors: All tensors among the arguments.

    Raises:
        RuntimeError: With CUDA's message.
    """
    name = func._overloadpacket.__name__
    near = [t for t in tensors if on_device(t)]
    if not near:
        generator = kwargs.get("generator")
        if kwargs.get("device") is not None and _is(kwargs["device"], device) and generator is not None:
            _refuse_generator(generator, device)
        return
    if kwargs.get("generator") is not None:
        _refuse_generator(kwargs["generator"], device)
    _check_operator(name, args, kwargs)
    far = [t for t in tensors if not on_device(t)]
    if not far or name in CROSSING:
        return
    if name in INDEXING:
        _check_indexing(args, kwargs, on_device)
        return
    written = {id(t) for t in tensors_in(written_in(func, args, kwargs))}
    allowed = 2 if name == "where" else 1
    scalars = torch.Tag.pointwise in func.tags or name in SCALAR_TOO
    if scalars and all(t.dim() == 0 and id(t) not in written for t in far):
        if len(far) > allowed:
            raise RuntimeError("Trying to pass too many CPU scalars to non-CPU kernel!")
        if not name.startswith("masked_fill") or on_device(args[1]):
            return
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {device} and cpu!"
    )


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of nested arguments, in order."""
    found: list[Tensor] = []
    _gather(value, found)
    return found


def _gather(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, list | tuple):
        for part in value:
            _gather(part, found)
    elif isinstance(value, dict):
        for part in value.values():
            _gather(part, found)


def _is(found: Any, device: torch.device) -> bool:
    return torch.device(found).type == device.type


def _refuse_generator(generator: torch.Generator, device: torch.device) -> None:
    if generator.device.type != device.type:
        raise RuntimeError(f"Expected a '{device.type}' device type for generator but found '{generator.device.type}'")


def _check_operator(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """What has no CUDA kernel."""
    if name == "linalg_lstsq":
        driver = kwargs.get("driver", args[3] if len(args) > 3 else None)
        if driver not in (None, "gels"):
            raise RuntimeError("torch.linalg.lstsq: parameter `driver` should be one of (gels)")
    if name in PRODUCTS and not (args[0].is_floating_point() or args[0].is_complex()):
        raise NotImplementedError(f"\"addmm_cuda\" not implemented for '{args[0].dtype}'")


def _check_indexing(args: Sequence[Any], kwargs: Mapping[str, Any], on_device: Callable[[Tensor], bool]) -> None:
    """Indices may lie on the CPU for a tensor of a GPU, never the other way round; values only where they are one."""
    held, indices = args[0], args[1]
    if not on_device(held) and any(on_device(t) for t in tensors_in(indices)):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    values = args[2] if len(args) > 2 else kwargs.get("values")
    if isinstance(values, Tensor) and on_device(values) != on_device(held):
        if on_device(values) or values.dim() > 0:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
            )


@functools.cache
def _writes(func: Any) -> tuple[tuple[int, str], ...]:
    """Place and name of the arguments that the operator writes into."""
    return tuple(
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def written_in(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that the operator writes into, None for those that are not given."""
    return [args[place] if place < len(args) else kwargs.get(name) for place, name in _writes(func)]


@functools.cache
def gives_written(func: Any) -> bool:
    """Whether all that the operator gives back are tensors that it wrote into."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and r.alias_info.is_write for r in returns)
