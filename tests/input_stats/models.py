"""Small bases on disk and data for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.calibrate.models import inputs_of, make


def write_base(path: Path, family: str = "llama") -> Path:
    make(family).model.save_pretrained(path)
    return path


def write_data(path: Path, seed: int = 0, samples: int = 12, family: str = "llama") -> Path:
    inputs: dict[str, Any] = inputs_of(family, torch.Generator().manual_seed(seed), samples, 8)
    save_file({key: value.contiguous() for key, value in inputs.items()}, path)
    return path
