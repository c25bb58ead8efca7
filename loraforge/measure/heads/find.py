"""The layout of the heads of a model in memory, or of a checkpoint by its headers."""

from __future__ import annotations

from torch import Tensor, nn

from loraforge.calibrate.base import load_config
from loraforge.checkpoints import Checkpoint
from loraforge.measure.heads.families import TRANSPOSED, layout_from_shapes
from loraforge.measure.heads.layout import HeadLayout
from loraforge.measure.heads.sections import lacks_heads

_BYPASS = "nn.MultiheadAttention reads its weights without calling its modules: gates and adapters would not act"
_PACKED = ".in_proj_weight"


def layout_of_model(model: nn.Module) -> HeadLayout:
    """The layout of a transformers model, also with a PEFT adapter in it; `doctor` confirms it.

    Raises:
        LoraforgeError: No attention is known, or heads and shapes contradict.
    """
    base = unwrapped(model)
    modules = modules_of(base)
    skipped = {name: _BYPASS for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)}
    inside = tuple(f"{name}." for name in skipped)
    linear = {
        name: layer_of(module)
        for name, module in modules.items()
        if not isinstance(module, nn.Embedding) and not name.startswith(inside) and _is_matrix(module)
    }
    transposed = [name for name, layer in linear.items() if type(layer).__name__ == "Conv1D"]
    to_dict = getattr(getattr(base, "config", None), "to_dict", None)
    content = to_dict() if callable(to_dict) else {}
    shapes = {name: _shape(layer) for name, layer in linear.items()}
    return layout_from_shapes(shapes, content, type(base).__name__, transposed=transposed, skipped=skipped)


def layout_of_checkpoint(checkpoint: Checkpoint) -> HeadLayout:
    """The layout of a model on disk; reads names, shapes and config.json, no tensor.

    Module names are those of the file. transformers is asked only for the defaults that a composed model's config.json
    leaves out.

    Raises:
        LoraforgeError: No attention is known, heads and shapes contradict, or config.json does not say the heads.
    """
    names = checkpoint.names
    skipped = {name.removesuffix(_PACKED): _BYPASS for name in names if name.endswith(_PACKED)}
    inside = tuple(f"{name}." for name in skipped)
    config = checkpoint.config
    if checkpoint.folder is not None and lacks_heads(config):
        config = load_config(checkpoint.folder).to_dict()
    turned = config.get("model_type") in TRANSPOSED
    shapes = {}
    for name in names:
        shape = checkpoint.shape(name)
        if name.endswith(".weight") and len(shape) == 2 and not name.startswith(inside):
            shapes[name.removesuffix(".weight")] = (shape[1], shape[0]) if turned else (shape[0], shape[1])
    return layout_from_shapes(shapes, config, checkpoint.path, skipped=skipped)


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model: a PEFT model's base, with the adapter's layers in the places of its modules."""
    get_base = getattr(model, "get_base_model", None)
    return get_base() if callable(get_base) else model


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by the names that they have without an adapter; a wrapped one is the adapter's layer itself."""
    base = unwrapped(model)
    found: dict[str, nn.Module] = {}
    hidden: tuple[str, ...] = ()
    for name, module in base.named_modules():
        if hidden and name.startswith(hidden):
            continue
        found[name] = module
        if layer_of(module) is not module:
            hidden += (f"{name}.",)
    return found


def layer_of(module: nn.Module) -> nn.Module:
    """The module itself, or that which an adapter's layer wraps; of one that an adapter carries whole, its copy."""
    copies = getattr(module, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        name = getattr(module, "active_adapter", None)
        return copies[name] if isinstance(name, str) and name in copies else module
    inner = getattr(module, "base_layer", None)
    return inner if isinstance(inner, nn.Module) else module


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(layer_of(module), "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def _shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in): packed weights of quantised layers have other shapes than the layer."""
    rows, columns = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    if isinstance(rows, int) and isinstance(columns, int):
        return rows, columns
    first, second = layer.weight.shape  # type: ignore[misc]
    return (second, first) if type(layer).__name__ == "Conv1D" else (first, second)
