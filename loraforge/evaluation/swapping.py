"""Heads put into a loaded model for a time: several tasks and adapters share one base in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from loraforge.errors import LoraforgeError


@contextmanager
def swapped(model: nn.Module, tensors: Mapping[str, Tensor], where: object) -> Iterator[None]:
    """The time in which these tensors are the model's; rows (classes) may be more or fewer than before.

    Args:
        model: A transformers model, or PEFT's wrapper around one (then its active copy of a head is meant).
        tensors: By the base model's names, as `classifier.weight`.
        where: Whose they are, for messages.

    Raises:
        LoraforgeError: The model has no such tensor, or one of other width.
    """
    kept: list[tuple[nn.Module, str, Any]] = []
    try:
        for key, tensor in tensors.items():
            owner, name = _find(model, key, where)
            held = getattr(owner, name)
            if held.shape[1:] != tensor.shape[1:]:
                got, expected = _shape(tensor), _shape(held)
                raise LoraforgeError(
                    f"the head has another width at '{key}'",
                    where=where,
                    got=got,
                    expected=expected,
                    hint="it was trained on another base; name that one with --base",
                )
            near = tensor.to(held.device, held.dtype)
            kept.append((owner, name, held))
            setattr(owner, name, nn.Parameter(near, requires_grad=False) if isinstance(held, nn.Parameter) else near)
        yield
    finally:
        for owner, name, held in reversed(kept):
            setattr(owner, name, held)


def _find(model: nn.Module, key: str, where: object) -> tuple[Any, str]:
    """The module that holds a tensor, and the tensor's name in it."""
    at: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    *path, name = key.split(".")
    for part in path:
        at = getattr(_inner(at), part, None)
    at = _inner(at)
    if getattr(at, name, None) is None:
        raise LoraforgeError(f"the base has no '{key}', which the head brings", where=where, hint="check --base")
    return at, name


def _inner(module: Any) -> Any:
    """What is inside PEFT's wrappers: the active copy of a module saved in full, the layer under an adapter's."""
    copies = getattr(module, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        return copies["default"]
    return getattr(module, "base_layer", module)


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))
