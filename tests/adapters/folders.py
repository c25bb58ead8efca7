"""Small adapter folders for tests, written without the package's writer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PREFIX = "base_model.model."


def factors(
    modules: Mapping[str, tuple[int, int, int]], seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """module -> (m, r, n) as PEFT keys with random factors."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (m, r, n) in modules.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(r, n, generator=generator).to(dtype)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(m, r, generator=generator).to(dtype)
    return tensors


def config(**fields: Any) -> dict[str, Any]:
    known = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "base_model_name_or_path": "tiny",
        "task_type": "CAUSAL_LM",
        "target_modules": ["q"],
        "bias": "none",
    }
    return {**known, **fields}


def write_folder(
    path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], kind: str = "safetensors"
) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps(settings))
    if kind == "safetensors":
        save_file({k: v.contiguous() for k, v in tensors.items()}, path / "adapter_model.safetensors", {"format": "pt"})
    else:
        torch.save(dict(tensors), path / "adapter_model.bin")
    return path


MODULES = {"layers.2.q": (6, 4, 5), "layers.10.q": (6, 4, 5)}


def simple(
    path: Path, seed: int = 0, extra: Mapping[str, Tensor] | None = None, modules: Any = None, **fields: Any
) -> Path:
    """A whole adapter of two modules with optional further tensors (names without prefix)."""
    tensors = factors(modules or MODULES, seed)
    tensors |= {PREFIX + name: tensor for name, tensor in (extra or {}).items()}
    return write_folder(path, tensors, config(**fields))
