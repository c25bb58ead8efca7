"""Runs code as on a machine with one GPU, and puts everything back."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from loraforge.kernels import backend
from tests.device.modes import Dispatch, Function
from tests.device.pretend import Pretend

# PyTorch switches devices through one object a device type; a CPU build has none for CUDA. Its own object for the CPU,
# which switches nothing, stands in.
_GUARDS = "_ZN3c104impl26device_guard_impl_registryE"
_CPU, _CUDA, _TYPES = 0, 1, 20


@contextmanager
def pretend_gpu(capacity: int = 8 * 2**30, fail_at: int | None = None, *, native: bool = True) -> Iterator[Pretend]:
    """A machine with one GPU.

    Args:
        capacity: Bytes of its memory.
        fail_at: The allocation (from 1) that fails as if the memory were full.
        native: The compiled operators were built with CUDA.
    """
    gpu = Pretend(capacity, fail_at)
    with ExitStack() as stack:
        stack.enter_context(_guarded())
        for name, value in _driver(gpu).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        # Weights that are tied stay tied, as they do where a parameter's memory is exchanged in place.
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, before)
        stack.enter_context(_built(native))
        stack.enter_context(_every_thread(gpu))
        stack.enter_context(_modes(gpu))
        yield gpu


@contextmanager
def _modes(gpu: Pretend) -> Iterator[None]:
    with Dispatch(gpu), Function(gpu):
        yield


@contextmanager
def _every_thread(gpu: Pretend) -> Iterator[None]:
    """Modes belong to a thread: each one that is started takes them on."""
    plain = threading.Thread.run

    def run(self: threading.Thread) -> None:
        with _modes(gpu):
            plain(self)

    with mock.patch.object(threading.Thread, "run", run):
        yield


@contextmanager
def _guarded() -> Iterator[None]:
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * _TYPES).in_dll(library, _GUARDS)
    before = guards[_CUDA]
    guards[_CUDA] = guards[_CPU]
    try:
        yield
    finally:
        guards[_CUDA] = before


def _missed(*_: Any) -> None:
    raise AssertionError("a call reached the driver of the GPU past the pretended one")


class _Event:
    """A mark in the queue of work: setting it and reading the time between two of them waits for nobody."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._at = 0.0

    def record(self, stream: object = None) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return (end._at - self._at) * 1e3


def _driver(gpu: Pretend) -> dict[str, Any]:
    """What is asked of torch.cuda."""
    properties = SimpleNamespace(
        name="pretended GPU", major=9, minor=0, total_memory=gpu.capacity, multi_processor_count=132,
        max_threads_per_multi_processor=2048, shared_memory_per_block_optin=227 * 1024, L2_cache_size=50 * 2**20,
    )  # fmt: skip
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda device=None: gpu.waited("synchronize"),
        "Event": _Event,
        "current_stream": lambda device=None: None,
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (gpu.capacity - gpu.live, gpu.capacity),
        "memory_allocated": lambda device=None: gpu.live,
        "max_memory_allocated": lambda device=None: gpu.peak,
        "reset_peak_memory_stats": lambda device=None: None,
        "_lazy_init": _missed,
    }


@contextmanager
def _built(native: bool) -> Iterator[None]:
    """A build that is there says that it has the operators of the GPU too; the CPU's answer for them."""
    if not native or not backend.native_available():
        yield
        return
    with mock.patch.object(backend, "native_devices", lambda: frozenset({"cpu", "cuda"})):
        yield
