"""The loss of a batch, from its logits: a sum over targets, so that a batch may be cut anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def task_logits(
    model: nn.Module, inputs: Mapping[str, Tensor], prepare: Any = None, options: Mapping[str, Any] | None = None
) -> Tensor:
    """Logits of a batch without its labels.

    Args:
        model: Possibly wrapped for several processes.
        inputs: What the model's forward takes, and `labels`.
        prepare: `prepare_decoder_input_ids_from_labels` of an encoder-decoder, or None.
        options: Further arguments of the forward.
    """
    given: dict[str, Any] = {**(options or {})}
    given |= {key: value for key, value in inputs.items() if key != "labels"}
    if prepare is not None and "decoder_input_ids" not in given:
        given["decoder_input_ids"] = prepare(labels=inputs["labels"])
    logits = model(**given).logits
    if not isinstance(logits, Tensor):
        raise RuntimeError(f"the model's logits are {type(logits).__name__}, not a tensor")
    return logits


def summed_cross_entropy(logits: Tensor, labels: Tensor, *, shifted: bool, smoothing: float = 0.0) -> Tensor:
    """Sum of the cross-entropy over all labels but -100, in float32.

    Args:
        logits: (B, C), or (B, T, V).
        labels: (B,) or (B, T).
        shifted: Position t predicts label t + 1.
        smoothing: Share of the target that is spread over all classes.
    """
    if shifted:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    return nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(),
        labels.reshape(-1).to(logits.device),
        ignore_index=-100,
        reduction="sum",
        label_smoothing=smoothing,
    )


def target_count(labels: Tensor, *, shifted: bool) -> Tensor:
    """Number of labels that a loss is taken over, a scalar int64."""
    return (labels[..., 1:] if shifted else labels).ne(-100).sum()
