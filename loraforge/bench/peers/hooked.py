"""Target modules of a model, hooks on their inputs, other weights put in place: what the document's loop stands on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Any]
Delta = Any
"""Dense (d_out, d_in), a pair (B, A), a triple (B, A, scaling), or an object with .B, .A and .scaling."""
MaskRule = Callable[[str, Tensor, Batch, nn.Module], Tensor | None]


def dense_delta(delta: Delta, like: Tensor) -> Tensor:
    """Any accepted form of a delta as a dense (d_out, d_in) tensor on `like`'s device and in its dtype."""
    if isinstance(delta, Tensor):
        return delta.to(like)
    parts = tuple(delta) if isinstance(delta, Sequence) else (delta.B, delta.A, delta.scaling)
    scaling = float(parts[2]) if len(parts) == 3 else 1.0
    return (parts[0].to(like) @ parts[1].to(like)) * scaling


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D keeps its weight as (d_in, d_out)."""
    return type(module).__name__ == "Conv1D"


def weight_of(module: nn.Module) -> Tensor:
    """(d_out, d_in) view of the weight of a Linear or a Conv1D."""
    weight = module.get_parameter("weight").data
    return weight.T if is_conv1d(module) else weight


def targets_of(model: nn.Module, adapters: Sequence[Mapping[str, Delta]]) -> dict[str, nn.Module]:
    """The modules that any adapter touches, in the model's own order."""
    wanted = {name for adapter in adapters for name in adapter}
    found = {name: module for name, module in model.named_modules() if name in wanted}
    if missing := sorted(wanted - set(found)):
        raise ValueError(f"adapters name modules that {type(model).__name__} does not have: {missing}")
    for name, module in found.items():
        if not (isinstance(module, nn.Linear) or is_conv1d(module)):
            raise ValueError(f"{name} is a {type(module).__name__}; nn.Linear or Conv1D expected")
    return found


def _fits(mask: Any, rows: Tensor) -> bool:
    """Whether a (B, L) mask counts the rows of a (B, L, d) or a flattened (B L, d) input."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return False
    return mask.shape == rows.shape[:-1] or (rows.dim() == 2 and mask.shape[1] > 1 and mask.numel() == len(rows))


def default_mask(name: str, rows: Tensor, batch: Batch, model: nn.Module) -> Tensor | None:
    """The padding mask that fits a module's input: of the encoder or of the decoder, by shape and then by name."""
    encoder, decoder = batch.get("attention_mask"), None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        decoder, labels = batch.get("decoder_attention_mask"), batch.get("labels")
        if decoder is None and labels is not None:
            decoder = labels != -100
    fits_encoder, fits_decoder = _fits(encoder, rows), _fits(decoder, rows)
    if fits_encoder and fits_decoder:  # equal lengths: keys and values of cross-attention read the encoder's output
        parts = name.split(".")
        cross = any("encdec" in part.lower() or part in ("encoder_attn", "crossattention") for part in parts)
        reads_output = cross and parts[-1] in ("k", "v", "k_proj", "v_proj", "key", "value")
        return encoder if reads_output or "decoder" not in parts else decoder
    return encoder if fits_encoder else decoder if fits_decoder else None


@contextmanager
def installed(modules: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with `weights` (d_out, d_in) in place of its own; the frozen ones come back at the end."""
    kept = {name: modules[name].get_parameter("weight").data for name in weights}
    try:
        for name, weight in weights.items():
            modules[name].get_parameter("weight").data = weight.T if is_conv1d(modules[name]) else weight
        yield
    finally:
        for name, data in kept.items():
            modules[name].get_parameter("weight").data = data


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, no gradients; the training flag comes back at the end."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def _capture(model: nn.Module, modules: Mapping[str, nn.Module], mask_rule: MaskRule) -> Iterator[tuple[dict, dict]]:
    """Hooks that append the unpadded input rows of every call of every module. Yields (store, the current batch)."""
    store: dict[str, list[Tensor]] = {name: [] for name in modules}
    current: dict[str, Any] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], _output: Any) -> None:
            rows = args[0].detach()
            mask = mask_rule(name, rows, current, model)
            if mask is not None:
                rows = rows[mask.bool().view(rows.shape[:-1])]
            store[name].append(rows.reshape(-1, rows.shape[-1]))

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in modules.items()]
    try:
        yield store, current
    finally:
        for handle in handles:
            handle.remove()


def input_rows(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Sequence[Batch], mask_rule: MaskRule
) -> dict[str, Tensor]:
    """Input rows (S, d_in) of every module over all batches, with the weights that the model holds now."""
    device = next(model.parameters()).device
    with _capture(model, modules, mask_rule) as (store, current):
        for batch in batches:
            current.clear()
            current.update({k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
            model(**current)
    if silent := [name for name, rows in store.items() if not rows]:
        raise ValueError(f"these target modules were never called on the calibration batches: {silent}")
    return {name: torch.cat(rows) for name, rows in store.items()}
