"""What a model's weights do not say but its configuration does: which are tied, which are stored transposed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from loraforge.checkpoints import Checkpoint

# What transformers raises on a configuration that it does not know, or a model that cannot be built without weights.
_UNBUILDABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, IndexError)


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The model that a configuration describes, without its weights.

    Attributes:
        conv1d: Modules that store their weight (n, m), transformers' Conv1D.
        transposed_experts: Modules whose stacked experts are stored (E, in, out).
        tied: Tensor -> the tensor that it shares its values with, names as in the model in memory.
        names: Tensor in the files -> its name in memory, where that is another one and the tensor is taken as it is.
        can_untie: Whether config.json may say tie_word_embeddings=false (T5 takes that for another architecture).
    """

    conv1d: frozenset[str]
    transposed_experts: frozenset[str]
    tied: dict[str, str]
    names: dict[str, str]
    can_untie: bool


def read_skeleton(base: Checkpoint) -> Skeleton | None:
    """Builds the model of a folder's config.json on no device; None where there is no class for it."""
    names = base.config.get("architectures") or []
    if base.folder is None or not names:
        return None
    import transformers

    cls = getattr(transformers, str(names[0]), None)
    if cls is None:
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(str(base.folder), local_files_only=True)
        with torch.device("meta"):
            model = cls(config)
        untied = type(config).from_dict(config.to_dict() | {"tie_word_embeddings": False})
    except _UNBUILDABLE:
        return None
    modules = dict(model.named_modules())
    return Skeleton(
        frozenset(name for name, module in modules.items() if type(module).__name__ == "Conv1D"),
        frozenset(name for name, module in modules.items() if getattr(module, "is_transposed", False)),
        dict(getattr(model, "all_tied_weights_keys", None) or {}),
        _names_in_memory(model, base),
        getattr(untied, "tie_word_embeddings", True) is False,
    )


def _names_in_memory(model: Any, base: Checkpoint) -> dict[str, str]:
    """How transformers renames tensors on loading: it keeps the names of older releases in the files that it writes."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return {}  # a release that renames nothing
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    found = {}
    for name in base.names:
        renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if converted is None and renamed != name and renamed in state and name not in state:
            found[name] = renamed
    return found
