"""One look at how the model runs its target modules: order, number of calls, shared inputs, which mask applies.

Nothing here depends on a model family's name: every fact is read off two or three tiny forwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loraforge.errors import LoraforgeError


@dataclass(frozen=True, slots=True)
class Trace:
    """What one forward of the model showed.

    Attributes:
        order: Module names in order of first call.
        calls: Number of calls of each module in one forward (more than 1: shared across depth).
        leaders: The first module that was fed the very same tensor (q, k and v have q).
        axis: "encoder", "decoder" or "all": whose attention mask says which rows count.
    """

    order: tuple[str, ...]
    calls: Mapping[str, int]
    leaders: Mapping[str, str]
    axis: Mapping[str, str]

    @property
    def is_feed_forward(self) -> bool:
        """Whether each target runs once a forward, so that one sweep reaches the fixed point exactly."""
        return all(count == 1 for count in self.calls.values())


def trace_model(
    model: nn.Module, modules: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], options: Mapping[str, object]
) -> Trace:
    """Runs the model on the first sample of `inputs` and records its target modules.

    Args:
        model: The base model.
        modules: Target modules by name.
        inputs: Tensors of one calibration batch; dimension 0 is the batch.
        options: Further keyword arguments of the forward (`use_cache=False`, ...).

    Raises:
        LoraforgeError: A target module that the forward never calls.
    """
    one = {k: v[:1] for k, v in inputs.items()}
    record = _record(model, modules, one, options)
    missing = [name for name in modules if name not in record.rows]
    if missing:
        raise LoraforgeError(
            "the model's forward never runs some of the adapters' modules",
            where=", ".join(missing[:8]),
            got=f"{len(missing)} of {len(modules)} modules never called",
            expected="calibration inputs that reach every adapted module",
            hint="encoder-decoder models need `target`, `labels` or decoder_input_ids in the calibration file",
        )
    encoder = _rows_when_shorter(model, modules, one, options, decoder=False)
    decoder = _rows_when_shorter(model, modules, one, options, decoder=True)
    axis = {}
    for name, rows in record.rows.items():
        if encoder is not None and encoder[name] != rows:
            axis[name] = "encoder"
        elif decoder is not None and decoder[name] != rows:
            axis[name] = "decoder"
        else:
            axis[name] = "all"
    return Trace(tuple(record.rows), record.calls, record.leaders, axis)


@dataclass(slots=True)
class _Record:
    rows: dict[str, int]
    calls: dict[str, int]
    leaders: dict[str, str]


def _record(
    model: nn.Module, modules: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], options: Mapping[str, object]
) -> _Record:
    record = _Record({}, {}, {})
    # The inputs are held, so that an address cannot be used twice; a change in place makes another version.
    seen: list[tuple[Tensor, int, str]] = []

    def watch(name: str) -> object:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            record.calls[name] = record.calls.get(name, 0) + 1
            if name in record.rows:
                return
            record.rows[name] = x.numel() // max(x.shape[-1], 1)
            record.leaders[name] = next(
                (leader for tensor, version, leader in seen if tensor is x and version == x._version), name
            )
            seen.append((x, x._version, record.leaders[name]))

        return hook

    handles = [m.register_forward_pre_hook(watch(n), with_kwargs=True) for n, m in modules.items()]  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            model(**inputs, **options)
    finally:
        for handle in handles:
            handle.remove()
    return record


def _rows_when_shorter(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    inputs: Mapping[str, Tensor],
    options: Mapping[str, object],
    *,
    decoder: bool,
) -> dict[str, int] | None:
    """Rows a module sees when the encoder's (or decoder's) tokens are one fewer; None if there is no such axis."""
    prefix = "decoder_" if decoder else ""
    ids = inputs.get(f"{prefix}input_ids")
    if ids is None or ids.shape[1] < 2:
        return None
    length = ids.shape[1]
    shorter = {
        key: value[:, :-1]
        if key.startswith("decoder_") == decoder and key != "pixel_values" and value.shape[1:2] == (length,)
        else value
        for key, value in inputs.items()
    }
    return _record(model, modules, shorter, options).rows
