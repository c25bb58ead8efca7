"""Adapters written to a folder: the same bytes for the same weights, and never a look at a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraforge.errors import LoraforgeError

CONFIG = "adapter_config.json"


def save_adapter(
    model: Any, folder: Path, adapter: str = "default", state_dict: dict[str, Tensor] | None = None
) -> None:
    """Writes one adapter of a PeftModel at the root of `folder`: weights, configuration, no model card.

    Args:
        model: The PeftModel.
        folder: Made as needed.
        adapter: Which one; `default` alone lies at the root by itself, another one must be given a folder of its own.
        state_dict: Gathered weights, where the engine has them in parts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(
        folder,
        selected_adapters=[adapter],
        state_dict=state_dict,
        # "auto" would ask the hub for the base's configuration; the vocabulary is never resized here.
        save_embedding_layers=False,
    )
    (folder / "README.md").unlink(missing_ok=True)
    sort_config(folder / CONFIG)


def sort_config(path: Path) -> None:
    """Puts the lists of an adapter_config.json in order: PEFT keeps them as sets, whose order no two runs share."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(config.get(key), list):
            config[key] = sorted(set(config[key]))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_weights(model: nn.Module) -> None:
    """Refuses trained weights that are not finite.

    Raises:
        LoraforgeError: Names them.
    """
    bad = [name for name, p in model.named_parameters() if p.requires_grad and not bool(torch.isfinite(p).all())]
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        hint = "a smaller --lr, warmup_steps, or max_grad_norm"
        raise LoraforgeError("trained weights are not finite", where="the last step", got=shown, hint=hint)
