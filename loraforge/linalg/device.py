"""Where to compute."""

from __future__ import annotations

import torch

from loraforge.errors import LoraforgeError, UsageError


def choose_device(name: str) -> torch.device:
    """The device of a name; auto is the GPU where there is one.

    Raises:
        UsageError: No such device.
        LoraforgeError: A GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError("unknown device", got=name, expected="auto, cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError("unsupported device", got=name, expected="auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise LoraforgeError("this torch sees no GPU", got=name, hint="use --device cpu; `loraforge doctor` says more")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LoraforgeError("there is no GPU of this number", got=name, expected=f"below {torch.cuda.device_count()}")
    return device
