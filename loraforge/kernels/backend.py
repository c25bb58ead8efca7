"""Which form of an operator runs: the compiled one of `loraforge._C`, or the PyTorch reference beside it.

`LORAFORGE_KERNELS` decides: `auto` (default) takes the compiled form where it was built for the device of the tensors,
`reference` never loads it, `native` refuses to run without it. Every choice is counted, and `kernel_report` shows it.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError, UsageError, did_you_mean

VARIABLE = "LORAFORGE_KERNELS"
MODES = ("auto", "reference", "native")
INTERFACE = 2  # as in csrc/common/interface.h
BUILD_COMMAND = "pip install -e . --no-build-isolation"

_calls: Counter[tuple[str, str]] = Counter()
_calls_lock = threading.Lock()
_load_lock = threading.Lock()
_fakes: dict[str, Callable[..., Any]] = {}
_noticed = False


class LoraforgeKernelNotice(UserWarning):
    """The compiled operators are missing and PyTorch computes in their place: same results, slower."""


def mode() -> str:
    """The value of `LORAFORGE_KERNELS`.

    Raises:
        UsageError: The variable holds another word than those of `MODES`.
    """
    value = os.environ.get(VARIABLE, "auto")
    if value not in MODES:
        raise UsageError(
            f"{VARIABLE} has an unknown value",
            where=f"environment variable {VARIABLE}",
            got=repr(value),
            expected=" or ".join(MODES),
            hint=did_you_mean(value, MODES),
        )
    return value


def _load() -> tuple[ModuleType | None, str]:
    """The module and why it is (not) used; tried once a process."""
    with _load_lock:
        return _load_once()


@functools.cache
def _load_once() -> tuple[ModuleType | None, str]:
    """Imports the module and registers the fakes, which need the schemas that it defines."""
    try:
        module = importlib.import_module("loraforge._C")
    except ModuleNotFoundError:
        return None, "loraforge._C was not built"
    except ImportError as error:  # built, but for another torch or Python
        return None, f"loraforge._C cannot be loaded: {error}"
    built = module.build_info().get("interface")
    if built != INTERFACE:
        return None, f"loraforge._C was built for interface {built} and the package needs {INTERFACE}: build it again"
    for name, function in _fakes.items():
        torch.library.register_fake(f"loraforge::{name}", function)
    return module, "loraforge._C is loaded"


def native_available() -> bool:
    """Whether the compiled operators are built and can be loaded, whatever `LORAFORGE_KERNELS` says."""
    return _load()[0] is not None


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Marks the function that gives the shapes of operator `name` without data (for torch.compile and opcheck)."""

    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        _fakes[name] = function
        return function

    return keep


def count(op: str, path: str) -> None:
    """Notes for `kernel_report` that `op` was answered by `path`."""
    with _calls_lock:
        _calls[op, path] += 1


def native_devices() -> frozenset[str]:
    """Types of the devices that the build has operators for; empty without a build."""
    module = _load()[0]
    return frozenset() if module is None else frozenset(module.build_info()["devices"])


def takes_native(op: str, *tensors: Tensor) -> bool:
    """Decides, and counts, whether this call of `op` goes to the compiled form.

    Args:
        op: Name of the operator.
        tensors: Its tensors; the compiled form needs all of them on one type of device that it was built for.

    Raises:
        UsageError: `LORAFORGE_KERNELS` has an unknown value.
        LoraforgeError: It is `native` and the compiled form is missing, or missing for the device.
    """
    asked = mode()
    devices = {t.device.type for t in tensors}
    native = asked != "reference" and len(devices) == 1 and devices <= native_devices()
    if not native:
        if asked == "native":
            _refuse_reference(op, devices)
        if asked == "auto":
            _notice_once(devices)
    count(op, ("cuda" if "cuda" in devices else "native") if native else "reference")
    return native


def _refuse_reference(op: str, devices: set[str]) -> None:
    built = ", ".join(sorted(native_devices()))
    raise LoraforgeError(
        f"{op} has no compiled form here and {VARIABLE}=native allows no other",
        where=f"environment variable {VARIABLE}",
        got=_load()[1] if not built else f"tensors on {', '.join(sorted(devices))}",
        expected="a build of loraforge._C" if not built else f"tensors on one of: {built}",
        hint=f"{BUILD_COMMAND}, or {VARIABLE}=auto",
    )


def _notice_once(devices: set[str]) -> None:
    global _noticed
    missing = "compiled operators" if not native_available() else "CUDA operators"
    if _noticed or (native_available() and devices != {"cuda"}):
        return
    _noticed = True  # before the warning, which a caller's filter may turn into an exception
    why = _load()[1] if not native_available() else "loraforge._C was built for the CPU alone"
    warnings.warn(
        f"{missing} are not used, PyTorch computes in their place ({why}); build them with: {BUILD_COMMAND}",
        LoraforgeKernelNotice,
        stacklevel=4,
    )


def kernel_report() -> dict[str, Any]:
    """What runs and what ran, ready for JSON.

    Returns:
        `mode`, `native` (whether the compiled form may be taken now), `why`, `build_info` and `capabilities` (empty
        without a build), `calls` (operator -> path -> number of calls in this process).
    """
    asked = mode()
    module, why = (None, f"{VARIABLE}=reference") if asked == "reference" else _load()
    calls: dict[str, dict[str, int]] = {}
    with _calls_lock:
        for (op, path), number in sorted(_calls.items()):
            calls.setdefault(op, {})[path] = number
    return {
        "mode": asked,
        "native": module is not None,
        "why": why,
        "build_info": {} if module is None else dict(module.build_info()),
        "capabilities": {} if module is None else dict(module.capabilities()),
        "calls": calls,
    }


def self_test(device: str | torch.device = "cpu") -> list[dict[str, Any]]:
    """Checks every operator, on the path that it takes now, against its reference on small odd sizes.

    Args:
        device: Where the tensors are.

    Returns:
        One row an operator: `op`, `device`, `path`, `max_error` (relative to the largest value of the reference),
        `tolerance`, `ok`.
    """
    from loraforge.kernels.conformance import run

    return run(device)
