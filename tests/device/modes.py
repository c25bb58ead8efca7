"""What brings every operator of a thread to the pretended GPU, also those that touch none of its tensors yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.device.pretend import CUDA, Pretend, is_near, on_host
from tests.device.refusals import tensors_in


class Dispatch(TorchDispatchMode):
    """Sees every operator, also those that touch no tensor of the device."""

    def __init__(self, gpu: Pretend) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.gpu.run(func, args, kwargs or {})


class Function(TorchFunctionMode):
    """Takes calls that name the device before PyTorch would start a driver for it."""

    def __init__(self, gpu: Pretend) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("to", "cuda", "type_as") and isinstance(args[0], Tensor):
            return self._moved(name, func, args, kwargs)
        if name in ("__getitem__", "__setitem__") and is_near(args[0]):
            return func(args[0], _listed(args[1]), *args[2:])
        if name == "new_tensor" and is_near(args[0]):
            made = torch.tensor(*args[1:], **({"dtype": args[0].dtype} | kwargs | {"device": "cpu"}))
            return self.gpu.upload(made)
        if name == "scaled_dot_product_attention" and is_near(args[0]):
            return self._attention(func, args, kwargs)
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda" or name == "_parse_to":
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != "cuda":
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device.type}'")
        if any(is_near(t) for t in tensors_in((args, kwargs))):  # zeros_like, new_zeros: already there
            return func(*args, **{k: v for k, v in kwargs.items() if k != "device"})
        made = func(*args, **(kwargs | {"device": "cpu"}))
        return self.gpu.upload(made) if name in ("tensor", "as_tensor") else self.gpu.wrap(made, {})

    def _moved(self, name: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """`.to`, `.cuda` and `.type_as` with the device of the GPU."""
        tensor, rest = args[0], list(args[1:])
        if name == "cuda":
            rest, kwargs = [], {"device": CUDA}
        other = next((a for a in [*rest, kwargs.get("other")] if isinstance(a, Tensor)), None)
        if other is not None:
            rest = [a for a in rest if a is not other]
            kwargs = {k: v for k, v in kwargs.items() if k != "other"} | {"device": other.device, "dtype": other.dtype}
            return (
                torch.Tensor.to(tensor, *([] if name == "type_as" else rest), **kwargs)
                if not is_near(other)
                else (self._moved("to", torch.Tensor.to, (tensor, *rest), kwargs))
            )
        place = next((a for a in rest if isinstance(a, str | int | torch.device)), None) if rest else None
        place = None if isinstance(place, bool) else place
        place = kwargs.get("device", place)
        if place is None or torch.device(place).type != "cuda":
            return func(tensor, *rest, **kwargs)
        if (torch.device(place).index or 0) != 0:
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")
        dtype = next((a for a in rest if isinstance(a, torch.dtype)), kwargs.get("dtype"))
        copy = bool(kwargs.get("copy", False))
        if is_near(tensor):
            return torch.Tensor.to(tensor, dtype=dtype, copy=copy)
        return self.gpu.upload(tensor if dtype is None else tensor.to(dtype))

    def _attention(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One kernel of the CPU for the fused one of CUDA."""
        tensors = list(tensors_in((args, kwargs)))
        if not all(is_near(t) for t in tensors):
            raise RuntimeError("Expected query, key, value and attn_mask to be on the same device")
        with no_dispatch():
            found = func(*on_host(args), **on_host(kwargs))
        return self.gpu.wrap(found, {})


def _listed(index: Any) -> Any:
    """An index with its lists as tensors of the CPU: PyTorch would make them on the device, past every mode."""
    if isinstance(index, tuple):
        return tuple(_listed(part) for part in index)
    return torch.tensor(index) if isinstance(index, list) else index
