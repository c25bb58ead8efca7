"""Model inputs as samples: one dict of tensors without a batch dimension, named as the model's forward takes them.

A sample is kept without trailing padding; padding on the left and holes in the mask stay, because they move positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraforge.calibrate.checks import DECODER, ENCODER, MASKS, Sample, check_batch, text_config
from loraforge.errors import LoraforgeError

IGNORED_LABEL = -100


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        LoraforgeError: A damaged or truncated file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise LoraforgeError(
            "the calibration file is not a whole .safetensors file",
            where=path,
            got=f"{path.stat().st_size} bytes: {error}",
            expected="a file written by safetensors, complete",
            hint="write or copy it again",
        ) from error


def samples_from_tensors(
    tensors: Mapping[str, Any], where: object, config: Any
) -> tuple[list[Sample], list[Any] | None]:
    """Samples from batched model inputs.

    Args:
        tensors: (N, ...) each, named as the forward takes them. `labels` (N, L) of an encoder-decoder model become its
            `decoder_input_ids`; `labels` (N,) are classes, used for balancing and not passed to the model.
        where: Source, for messages.
        config: The model's configuration, or None.

    Returns:
        The samples, and the classes if there are any.

    Raises:
        LoraforgeError: First dimensions that disagree, a wrong dtype or number of dimensions, no sample.
    """
    batch = {str(key): _as_tensor(key, value, where) for key, value in tensors.items()}
    check_batch(batch, where)
    labels = batch.pop("labels", None)
    classes = labels.tolist() if labels is not None and labels.ndim == 1 else None
    if labels is not None and getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in batch:
        if labels.ndim != 2:
            raise LoraforgeError(
                "labels of an encoder-decoder model are token ids",
                where=f"{where}, labels",
                got=f"shape {tuple(labels.shape)}",
                expected="(samples, tokens)",
            )
        pairs = [shift_right(row, config, f"{where}, labels, sample {i}") for i, row in enumerate(labels)]
        rows = [{key: value[i] for key, value in batch.items()} for i in range(len(pairs))]
        samples = [row | {DECODER[0]: ids, DECODER[1]: mask} for row, (ids, mask) in zip(rows, pairs, strict=True)]
    else:
        count = next(iter(batch.values())).shape[0] if batch else 0
        samples = [{key: value[i] for key, value in batch.items()} for i in range(count)]
    return [trim_padding(sample) for sample in samples], classes


def shift_right(labels: Tensor, config: Any, where: object) -> tuple[Tensor, Tensor]:
    """Decoder inputs (and their mask) that teach-force the labels of one sample.

    Args:
        labels: (L,) token ids; -100 and trailing padding ids are no tokens.
        config: The model's configuration: `decoder_start_token_id`, `pad_token_id`.
        where: Source, for messages.

    Raises:
        LoraforgeError: No start token in the configuration, or no token in the labels.
    """
    start, pad = (text_config(config, name) for name in ("decoder_start_token_id", "pad_token_id"))
    if start is None:
        raise LoraforgeError(
            "the base's configuration names no decoder_start_token_id, so labels cannot be turned into decoder inputs",
            where=where,
            hint="give decoder_input_ids in a .safetensors file",
        )
    pad = 0 if pad is None else pad
    valid = labels != IGNORED_LABEL
    kept = (valid & (labels != pad)).nonzero()
    if kept.numel() == 0:
        raise LoraforgeError("the labels hold no token", where=where, expected="at least one token that is not padding")
    length = int(kept[-1]) + 1
    ids = torch.full((length,), int(start), dtype=torch.int64)
    ids[1:] = torch.where(valid, labels, pad)[: length - 1]
    mask = torch.ones(length, dtype=torch.int64)
    mask[1:] = valid[: length - 1]
    return ids, mask


def trim_padding(sample: Sample) -> Sample:
    """The sample with masks for its tokens and without trailing padding (mask 0)."""
    trimmed = dict(sample)
    for names, mask_name in ((ENCODER, MASKS[0]), (DECODER, MASKS[1])):
        tokens = next((sample[n] for n in names if n in sample and n != mask_name), None)
        if tokens is None:
            continue
        mask = sample.get(mask_name)
        mask = torch.ones(tokens.shape[0], dtype=torch.int64) if mask is None else mask.to(torch.int64)
        trimmed[mask_name] = mask
        kept = mask.nonzero()
        if mask.ndim != 1 or kept.numel() == 0:
            continue  # left as it is: `check_samples` names the sample
        length = int(kept[-1]) + 1
        trimmed |= {n: trimmed[n][:length] for n in names if n in trimmed and trimmed[n].shape[0] == mask.shape[0]}
    return trimmed


def _as_tensor(key: object, value: Any, where: object) -> Tensor:
    try:
        tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LoraforgeError(
            "an input is not a tensor", where=f"{where}, {key}", got=type(value).__name__, expected="a tensor or array"
        ) from error
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor
