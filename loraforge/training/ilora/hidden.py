"""Hidden states of the wanted layers, and of no others where transformers can leave them out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError


@dataclass(frozen=True)
class HiddenStates:
    """Which hidden states of a model are wanted, and how it is asked for them.

    Attributes:
        layers: Indices into the L + 1 hidden states, 0 the embeddings; of the decoder where there is one.
        request: Value of `output_hidden_states`: these layers alone, or True where that is not understood.
    """

    layers: tuple[int, ...]
    request: bool | list[int]

    def of(self, outputs: Any) -> list[Tensor]:
        """The wanted states of a forward that got `request`, (B, T, H) each."""
        states = all_states(outputs)
        return [states[layer] for layer in self.layers]


def all_states(outputs: Any) -> Sequence[Tensor]:
    """The tuple of hidden states: the decoder's where there is one."""
    for name in ("decoder_hidden_states", "hidden_states"):
        states = outputs.get(name)
        if states is not None:
            return states
    raise LoraforgeError(
        "the model gives no hidden states",
        where="output_hidden_states",
        got=", ".join(outputs),
        hint="consistency_weight=0 trains without the consistency loss",
    )


def resolve_layers(layers: Sequence[int] | str, count: int) -> tuple[int, ...]:
    """Indices counted from 0.

    Args:
        layers: Indices, negative ones from the end, or "all": every block, 1 to L.
        count: L + 1.

    Raises:
        LoraforgeError: An index out of range, or one layer twice.
    """
    if isinstance(layers, str):
        return tuple(range(1, count))
    wrong = [layer for layer in layers if not -count <= layer < count]
    if wrong:
        raise LoraforgeError(
            "hidden_state_layers names layers that the model does not have",
            where="hidden_state_layers",
            got=", ".join(map(str, wrong)),
            expected=f"{-count} to {count - 1}: 0 is the embeddings, {count - 1} or -1 the last of {count - 1} layers",
        )
    found = tuple(layer % count for layer in layers)
    if len(set(found)) < len(found):
        raise LoraforgeError(
            "hidden_state_layers names a layer twice",
            where="hidden_state_layers",
            got=", ".join(map(str, layers)),
            expected=f"different ones of {count} hidden states",
        )
    return found


@torch.no_grad()
def probe(model: Any, inputs: Mapping[str, Tensor], layers: Sequence[int] | str) -> HiddenStates:
    """Finds out how a model is asked for these layers, by one row in evaluation mode.

    Releases of transformers differ in whether a list is understood, and models in what negative indices of it count
    from (encoder-decoders: the encoder's layers). So the answer to a list is compared with the full one.

    Args:
        model: Not wrapped.
        inputs: Of one forward, one row is enough.
        layers: Of the config.

    Raises:
        LoraforgeError: A layer is out of range, or the model gives no hidden states.
    """
    training = model.training
    model.eval()
    try:
        states = all_states(model(**inputs, output_hidden_states=True))
        wanted = resolve_layers(layers, len(states))
        listed = all_states(model(**inputs, output_hidden_states=list(wanted)))
    finally:
        model.train(training)
    exact = len(listed) == len(states) and all(
        listed[layer] is not None and torch.equal(listed[layer], states[layer]) for layer in wanted
    )
    return HiddenStates(wanted, list(wanted) if exact else True)


def accepted(model: Any, **options: Any) -> dict[str, Any]:
    """Those of the options that the model's forward has a parameter for."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(base.forward).parameters
    return {name: value for name, value in options.items() if name in known}
