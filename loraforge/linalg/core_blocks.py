"""The blocks of a core as the entries of an element-wise rule."""

from __future__ import annotations

import dataclasses

from loraforge.linalg.core import Core, core_of
from loraforge.linalg.elements import Deltas, adds, deltas_of
from loraforge.types import Dense, LayerInputs


def core_blocks(layer: LayerInputs) -> tuple[Core, Deltas]:
    """The core of a module and its blocks C_i (p, q), weights in them.

    An adapter that adds nothing (a delta or a weight of zero) has no say in the bases: they are those that the module
    has without it.

    Raises:
        LoraforgeError: No adapter has the module, shapes differ, or a factor holds NaN or Inf.
    """
    adding = [
        f if f is not None and adds(w, f, layer.module) else None
        for w, f in zip(layer.weights, layer.factors, strict=True)
    ]
    core = core_of(dataclasses.replace(layer, factors=adding) if any(f is not None for f in adding) else layer)
    blocks = [None if block is None else Dense(block) for block in core.blocks]
    deltas = deltas_of(LayerInputs(layer.module, blocks, [1.0] * len(blocks)))
    return core, dataclasses.replace(deltas, dtype=core.dtype)
