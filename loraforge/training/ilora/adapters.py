"""The two adapters of a model: `default` is plastic and learns, `ema` is stable and follows.

`ema` never asks for a gradient, so no optimiser, reducer or checkpointed backward ever sees it; a switch changes only
the name of the active adapter in every tuner layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from loraforge.errors import LoraforgeError, raise_problems
from loraforge.training.ilora.ema import EmaPairs, Pair
from loraforge.training.saving import CONFIG, save_adapter, sort_config

PLASTIC, STABLE = "default", "ema"
WEIGHTS = "adapter_model.safetensors"
_CONTAINERS = ("modules_to_save", "trainable_tokens_delta")
_SHOWN = 5


def add_stable(model: PeftModel) -> None:
    """Adds the adapter `ema` to a model with the adapter `default`: a frozen exact copy.

    Raises:
        LoraforgeError: The adapter is of a kind whose two copies cannot stand side by side.
    """
    _check_kind(model)
    if STABLE not in model.peft_config:
        config = copy.deepcopy(model.peft_config[PLASTIC])
        # The initialisations that change base weights (PiSSA, OLoRA, ...) did so for `default` already.
        config.init_lora_weights = False
        config.inference_mode = True
        training = model.training
        with torch.random.fork_rng(devices=_devices(model)):  # what is drawn here is overwritten below
            model.add_adapter(STABLE, config)
        model.train(training)
    with torch.no_grad():
        for pair in pair_adapters(model):
            pair.stable.data = pair.stable.data.to(pair.plastic.dtype)
            pair.stable.copy_(pair.plastic)


def pair_adapters(model: PeftModel) -> list[Pair]:
    """Every tensor of `default` with its counterpart in `ema`; the first trainable, the second frozen from here on.

    Raises:
        LoraforgeError: There is no `ema`, nothing pairs, shapes differ, or something is trained that has no
            counterpart.
    """
    _check_kind(model)
    if STABLE not in model.peft_config:
        raise LoraforgeError(
            "the model has no stable adapter",
            where="adapters",
            got=", ".join(model.peft_config),
            expected=f"{PLASTIC} and {STABLE}",
            hint="loraforge.training.ilora.adapters.add_stable adds it",
        )
    plastic, stable = _tensors(model, PLASTIC), _tensors(model, STABLE)
    problems = []
    for name in plastic.keys() | stable.keys():
        shapes = [tuple(side[name].shape) if name in side else "none" for side in (plastic, stable)]
        if shapes[0] != shapes[1]:
            problems.append(
                LoraforgeError(f"{PLASTIC} and {STABLE} differ", where=name, got=f"{STABLE}: {shapes[1]}",
                               expected=f"as {PLASTIC}: {shapes[0]}")
            )  # fmt: skip
    if not plastic and not stable:
        problems.append(
            LoraforgeError("no pair of adapter tensors was found", where="model", got=0, expected="1 or more")
        )
    raise_problems(sorted(problems, key=lambda problem: str(problem.where)))
    pairs = [Pair(name, plastic[name], stable[name]) for name in plastic]
    for pair in pairs:
        pair.plastic.requires_grad_(True)
        pair.stable.requires_grad_(False)
    _check_trainable(model, pairs)
    return pairs


def _tensors(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters by their names in the model, without the adapter's own name."""
    found = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        for at in range(1, len(parts)):
            # A module of the base may be called as an adapter is; under these containers it is one.
            if parts[at] == adapter and (parts[at - 1].startswith("lora_") or parts[at - 1] in _CONTAINERS):
                found[".".join([*parts[:at], *parts[at + 1 :]])] = parameter
    return found


def _check_trainable(model: nn.Module, pairs: list[Pair]) -> None:
    paired = {id(pair.plastic) for pair in pairs}
    shared = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in paired]
    if shared:
        shown = ", ".join(shared[:_SHOWN]) + (f" and {len(shared) - _SHOWN} more" if len(shared) > _SHOWN else "")
        raise LoraforgeError(
            "tensors are trained that the two adapters would share",
            where="model",
            got=shown,
            expected="adapter tensors and modules_to_save alone",
            hint="bias=none, and heads in modules_to_save",
        )


def _check_kind(model: PeftModel) -> None:
    config = getattr(model, "peft_config", {}).get(PLASTIC)
    if config is None:
        got = ", ".join(getattr(model, "peft_config", {})) or "none"
        raise LoraforgeError("the model has no adapter to train", where="adapters", got=got, expected=PLASTIC)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    problems = []
    if kind != "LORA":
        problems.append(
            LoraforgeError("this kind of adapter has no stable copy", where="peft_type", got=kind, expected="LORA")
        )
    if getattr(config, "bias", "none") != "none":
        got = repr(config.bias)
        problems.append(
            LoraforgeError("biases of the base are shared by all adapters", where="bias", got=got, expected="'none'")
        )
    if getattr(config, "ensure_weight_tying", False):
        problems.append(
            LoraforgeError("tied adapters have no stable copy of their own", where="ensure_weight_tying", got=True)
        )
    raise_problems(problems)


def _devices(model: nn.Module) -> list[int]:
    """GPUs that hold parameters, whose random state is to be kept."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


class Switch:
    """Switches a model's active adapter by name; `requires_grad` and modes stay as they are.

    Args:
        model: A PeftModel; its layers are collected once.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [
            module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        ]
        if not self._layers or not all(hasattr(layer, "_active_adapter") for layer in self._layers):
            raise LoraforgeError(
                "adapters of this release of PEFT cannot be switched by name",
                where="peft",
                expected="tuner layers with _active_adapter",
            )

    @contextmanager
    def active(self, adapter: str) -> Iterator[None]:
        """Within the block `adapter` is the active one; then, also after an exception, the ones before."""
        before = [layer._active_adapter for layer in self._layers]
        for layer in self._layers:
            # Past nn.Module.__setattr__, which looks for parameters: the name is a plain attribute.
            layer.__dict__["_active_adapter"] = [adapter]
        try:
            yield
        finally:
            for layer, names in zip(self._layers, before, strict=True):
                layer.__dict__["_active_adapter"] = names


def active(model: nn.Module, adapter: str) -> Any:
    """Context manager: within it `adapter` is the active one of the model. `Switch` does it at less cost each time.

    Raises:
        LoraforgeError: The model has no such adapter.
    """
    known = list(getattr(model, "peft_config", {}))
    if adapter not in known:
        raise LoraforgeError("the model has no such adapter", where="adapter", got=adapter, expected=", ".join(known))
    return Switch(model).active(adapter)


def save_pair(model: PeftModel, folder: Path, pairs: EmaPairs | None = None, *, stable: bool = True) -> None:
    """Writes `default/` and `ema/` of a task's folder, each a whole adapter with its weights at its root.

    Args:
        model: With both adapters.
        folder: Of the task.
        pairs: Where the average is kept in more precision than the adapters; it is what is written then.
        stable: Whether `ema` is written.
    """
    save_adapter(model, folder / PLASTIC, PLASTIC)
    if stable:
        save_stable(model, folder, pairs)


def save_stable(model: PeftModel, folder: Path, pairs: EmaPairs | None = None) -> None:
    """Writes `folder/ema`: PEFT puts any adapter but `default` into a folder of its name."""
    card = folder / "README.md"
    had_card = card.exists()
    with nullcontext() if pairs is None else pairs.full_precision():
        model.save_pretrained(folder, selected_adapters=[STABLE], save_embedding_layers=False)
    if not had_card:
        card.unlink(missing_ok=True)
    sort_config(folder / STABLE / CONFIG)


def load_pair(model: PeftModel, plastic: Path, stable: Path, pairs: EmaPairs | None = None) -> None:
    """Copies two saved adapters into `default` and `ema`.

    Args:
        model: With both adapters.
        plastic: Folder of the one for `default`.
        stable: Folder of the one for `ema`.
        pairs: Where the average is kept in more precision than the adapters; it is what is loaded then.

    Raises:
        LoraforgeError: As `load_adapter`.
    """
    load_adapter(model, plastic, PLASTIC)
    with nullcontext() if pairs is None else pairs.full_precision():
        load_adapter(model, stable, STABLE)


@torch.no_grad()
def load_adapter(model: PeftModel, folder: Path, adapter: str) -> None:
    """Copies the tensors of a saved adapter into an adapter of the model; nothing is merged, nothing else changes.

    Args:
        model: With that adapter.
        folder: With adapter_config.json and weights at its root.
        adapter: `default` or `ema`.

    Raises:
        LoraforgeError: Files or tensors are missing, or of other names or shapes.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise LoraforgeError(f"there is no adapter for {adapter}", where=folder, expected=f"{CONFIG} and {WEIGHTS}")
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        reason = str(error).strip()
        raise LoraforgeError("an adapter cannot be read", where=folder / WEIGHTS, got=reason) from error
    # The tensors of a state share their memory with the parameters, under the names of the file.
    wanted = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    problems = []
    for name in sorted(wanted.keys() | weights.keys()):
        got = tuple(weights[name].shape) if name in weights else "none"
        expected = tuple(wanted[name].shape) if name in wanted else "none"
        if got != expected:
            problems.append(LoraforgeError("a tensor does not fit the model", where=f"{folder}: {name}", got=got,
                                           expected=expected))  # fmt: skip
    if len(problems) > _SHOWN:
        more = len(problems) - _SHOWN
        problems = [*problems[:_SHOWN], LoraforgeError(f"and {more} more tensors of this adapter", where=folder)]
    raise_problems(problems)
    for name, tensor in wanted.items():
        tensor.copy_(weights[name])
