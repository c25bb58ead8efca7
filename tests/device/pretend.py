"""A GPU that is not there: tensors that say they are on cuda:0 and keep their numbers in the CPU's memory.

Every operator on such a tensor is computed by the CPU's kernel on what it wraps, so numbers agree with the CPU's to the
bit wherever the code does the same on both. What CUDA refuses is refused (`refusals`), what makes the host wait is
counted with the line of loraforge that asked for it, operators on CPU tensors are noted, and memory is accounted for
and can run out. `machine.pretend_gpu` is the way to it.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from tests.device.refusals import check, gives_written, tensors_in, written_in
from tests.device.sites import call_site

CUDA = torch.device("cuda:0")
# Operators that make the host wait for the GPU: their result's shape, or an error code, is read back.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2", "unique_dim",
    "unique_consecutive", "_linalg_svd", "_linalg_eigh", "linalg_eig", "_linalg_solve_ex", "linalg_lstsq",
}  # fmt: skip
# Operators that do no arithmetic: what they do on the CPU is reading, moving or looking.
SILENT = {"_to_copy", "copy_", "_unsafe_view", "empty", "clone", "lift_fresh"}
RESIZING = {"resize_", "set_", "as_strided_"}


class DeviceTensor(Tensor):
    """A tensor of the device; `host` has its numbers and `block` its memory."""

    host: Tensor
    block: Block

    @staticmethod
    def __new__(cls, inner: Tensor, block: Block) -> DeviceTensor:
        made: DeviceTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=CUDA, requires_grad=inner.requires_grad,
        )  # fmt: skip
        made.host, made.block = inner, block
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _of(args, kwargs or {}).run(func, args, kwargs or {})

    def numpy(self, *, force: bool = False) -> Any:  # type: ignore[override]
        if force:
            return self.cpu().numpy()
        raise TypeError(
            f"can't convert {CUDA} device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        self.block.gpu.waited("tolist")
        return self.host.tolist()

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DeviceTensor({self.host!r})"

    def __reduce_ex__(self, proto: Any) -> Any:
        raise NotImplementedError("a tensor of the pretended GPU cannot be pickled")


@dataclass(eq=False)
class Block:
    """Memory of the device, freed with the last tensor that holds it."""

    gpu: Pretend
    address: int
    bytes: int
    held: bool = False

    def __post_init__(self) -> None:
        self.gpu.take(self.bytes)
        self.held = True

    def __del__(self) -> None:
        if self.held:
            self.gpu.free(self.bytes)


def _of(args: Any, kwargs: Any) -> Pretend:
    return next(t.block.gpu for t in tensors_in((args, kwargs)) if isinstance(t, DeviceTensor))


def is_near(tensor: Tensor) -> bool:
    """Whether a tensor is on the device."""
    return isinstance(tensor, DeviceTensor)


@dataclass(eq=False)
class Pretend:
    """The device, and what happened on it.

    Attributes:
        capacity: Bytes of its memory.
        fail_at: The allocation (from 1) that fails as if the memory were full; None for none.
        waits: (operator, line of loraforge) -> times that the host waited for the device.
        uploads: Line -> number of copies to the device.
        host_ops: (operator, line) -> largest number of entries of an operator on CPU tensors.
        native: Operator of loraforge -> times that it was asked for on the device.
        allocations: Blocks taken so far.
        live: Bytes in use.
        peak: Most bytes in use.
    """

    capacity: int = 8 * 2**30
    fail_at: int | None = None
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    host_ops: dict[tuple[str, str], int] = field(default_factory=dict)
    native: Counter[str] = field(default_factory=Counter)
    allocations: int = 0
    live: int = 0
    peak: int = 0
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def take(self, size: int) -> None:
        """Accounts for a block.

        Raises:
            torch.OutOfMemoryError: There is no room, or it is the one that has to fail.
        """
        with self._lock:
            self.allocations += 1
            if self.allocations == self.fail_at or self.live + size > self.capacity:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU 0 has a total capacity of "
                    f"{self.capacity / 2**30:.2f} GiB of which {(self.capacity - self.live) / 2**20:.2f} MiB is free."
                )
            self.live += size
            self.peak = max(self.peak, self.live)

    def free(self, size: int) -> None:
        """Gives a block back."""
        with self._lock:
            self.live -= size

    def waited(self, what: str) -> None:
        """Counts a wait of the host."""
        site = call_site()
        with self._lock:
            self.waits[what, site] += 1

    def upload(self, tensor: Tensor) -> DeviceTensor:
        """A copy of a CPU tensor on the device, laid out as it is."""
        with self._lock:
            self.uploads[call_site()] += 1
        return self.wrap(tensor.detach().clone(memory_format=torch.preserve_format), {})

    def wrap(self, value: Any, known: dict[int, Block]) -> Any:
        """Tensors of a result on the device; those in memory that is `known` share its block."""
        if isinstance(value, list | tuple):
            return type(value)(self.wrap(v, known) for v in value)
        if not isinstance(value, Tensor) or is_near(value):
            return value
        storage = value.untyped_storage()
        address = storage.data_ptr()
        block = known.get(address) if address else None
        if block is None:
            block = known[address] = Block(self, address, storage.nbytes())
        return DeviceTensor(value, block)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operator, of whichever device its tensors are."""
        name = func._overloadpacket.__name__
        asked = kwargs.get("device")
        to_device = asked is not None and torch.device(asked).type == "cuda"
        tensors = tensors_in((args, kwargs))
        check(func, args, kwargs, is_near, CUDA, tensors)
        near = [t for t in tensors if is_near(t)]
        if not near and not to_device:
            if tensors and not (func.is_view or name in SILENT):
                self._note_host(name, tensors)
            return func(*args, **kwargs)
        if name in RESIZING:
            raise NotImplementedError(f"the pretended GPU has no {func}")
        if name == "_to_copy" and not near:
            return self.upload(func(*args, **(kwargs | {"device": "cpu"})))
        self._note_device(func, name, args, kwargs)
        known = {t.block.address: t.block for t in near if t.block.address}
        off = asked is not None and not to_device
        if to_device:
            kwargs = kwargs | {"device": "cpu"}
        found = _call(func, name, on_host(args), on_host(kwargs))
        if off or (name in ("copy_",) and not is_near(args[0])):
            return args[0] if name == "copy_" else found
        return self._returned(func, args, kwargs, found, known)

    def _returned(self, func: Any, args: Any, kwargs: Any, found: Any, known: dict[int, Block]) -> Any:
        """The result with the very tensors that were written into where the schema says so."""
        written = written_in(func, args, kwargs)
        if torch.Tag.inplace_view in func.tags:
            _reshape(func, args, kwargs)
        for tensor in tensors_in(written):
            if is_near(tensor) and tensor.shape != tensor.host.shape:
                raise NotImplementedError(f"{func} resized its output, which the pretended GPU cannot")
        if written and gives_written(func):
            real = [w for w in written if w is not None]
            return real[0] if len(func._schema.returns) == 1 else tuple(real)
        return self.wrap(found, known)

    def _note_host(self, name: str, tensors: list[Tensor]) -> None:
        sizes = [t.numel() for t in tensors if t.device.type == "cpu"]
        if sizes:
            key = name, call_site()
            with self._lock:
                self.host_ops[key] = max(self.host_ops.get(key, 0), *sizes)

    def _note_device(self, func: Any, name: str, args: Any, kwargs: Any) -> None:
        if func.namespace == "loraforge":
            with self._lock:
                self.native[name] += 1
        masks = name.startswith(("index", "_index")) and any(
            t.dtype in (torch.bool, torch.uint8) for t in tensors_in(args[1]) if is_near(t)
        )
        home = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
        back = name == "copy_" and not is_near(args[0])
        if name in WAITING or masks or (name == "_to_copy" and home) or back:
            self.waited("cpu" if home or back else name)
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.waited(name)
        if name == "copy_" and is_near(args[0]) and not is_near(args[1]):
            with self._lock:
                self.uploads[call_site()] += 1


def on_host(value: Any) -> Any:
    if isinstance(value, DeviceTensor):
        return value.host
    if isinstance(value, list | tuple):
        return type(value)(on_host(v) for v in value)
    return {k: on_host(v) for k, v in value.items()} if isinstance(value, dict) else value


def _reshape(func: Any, args: Any, kwargs: Any) -> None:
    """Gives the wrapper the shape that an operator such as `squeeze_` gave to its numbers."""
    with no_dispatch():
        before = torch._C._meta_in_tls_dispatch_include()
        torch._C._set_meta_in_tls_dispatch_include(True)
        try:
            func(*args, **kwargs)
        finally:
            torch._C._set_meta_in_tls_dispatch_include(before)


def _call(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """The operator on the CPU; what only CUDA has is made of what the CPU has."""
    if func._overloadname in ("dtype", "dtype_out") and name in ("mm", "bmm", "addmm", "baddbmm"):
        # torch.mm(..., out_dtype=float32) of half precision: products and sums in float32.
        wide = next(a for a in [*args, kwargs.get("out_dtype")] if isinstance(a, torch.dtype))
        wider = [a.to(wide) if isinstance(a, Tensor) else a for a in args if not isinstance(a, torch.dtype)]
        return getattr(torch, name)(*wider, **{k: v for k, v in kwargs.items() if k != "out_dtype"})
    if name == "linalg_lstsq":
        return func(*args[:3], **({k: v for k, v in kwargs.items() if k != "driver"} | {"driver": "gels"}))
    return func(*args, **kwargs)
