"""Calibration sets cut into padded batches: one task and one fold each, samples of like length together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from loraforge.calibrate.checks import DECODER, ENCODER, MASKS, Sample
from loraforge.calibrate.sampling import content_hash
from loraforge.calibrate.tensors import trim_padding
from loraforge.errors import LoraforgeError

if TYPE_CHECKING:
    from loraforge.calibrate.data import CalibrationSet

# Pixels an image patch, to guess an image's tokens where nobody says how many there are.
PATCH = 16 * 16


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Samples of one task and one fold, padded on the right.

    Attributes:
        task: Index of the task.
        fold: Index of the fold.
        inputs: What the model's forward takes, (b, ...) each.
        enc_mask: (b, L) true at the tokens of `input_ids`; None where the model reads no tokens (images).
        dec_mask: (b, Ld) the same for `decoder_input_ids`.
        indices: The samples' positions in their calibration set.
    """

    task: int
    fold: int
    inputs: dict[str, Tensor]
    enc_mask: Tensor | None
    dec_mask: Tensor | None
    indices: tuple[int, ...]


def make_batches(
    sets: Sequence[CalibrationSet],
    folds: Sequence[Sequence[int]],
    *,
    batch_tokens: int = 4096,
    pad_id: int = 0,
    batch_samples: int | None = None,
    image_tokens: int | None = None,
) -> list[Batch]:
    """Cuts every (task, fold) into batches, tasks and folds in order, longest samples first.

    Samples of equal length are ordered by their content, so the order of the rows in a file changes no batch.

    Args:
        sets: One calibration set a task.
        folds: Fold of every sample, one list a task.
        batch_tokens: Most tokens in a batch, padding included; a batch has at least one sample.
        pad_id: Token id of padding (masked, so it never enters a statistic).
        batch_samples: Most samples in a batch (`if_divide`).
        image_tokens: Tokens an image counts for; default its pixels / 256 + 1.

    Raises:
        LoraforgeError: Counts that disagree or are out of range.
    """
    if batch_tokens < 1:
        raise LoraforgeError("batch_tokens is out of range", got=batch_tokens, expected="1 or more")
    if len(sets) != len(folds):
        raise LoraforgeError("folds are given for another number of tasks", got=len(folds), expected=len(sets))
    batches: list[Batch] = []
    for task, (cset, assigned) in enumerate(zip(sets, folds, strict=True)):
        samples = [trim_padding(sample) for sample in cset.samples]
        if len(assigned) != len(samples):
            got = f"{len(assigned)} folds for {len(samples)} samples"
            raise LoraforgeError("every sample needs a fold", where=cset.name, got=got)
        sizes = [_tokens(sample, image_tokens) for sample in samples]
        order = sorted(range(len(samples)), key=lambda i: (-sizes[i][0], -sizes[i][1], content_hash(samples[i])))
        for fold in sorted(set(assigned)):
            members = [i for i in order if assigned[i] == fold]
            for chunk in _chunks(members, sizes, batch_tokens, batch_samples):
                batches.append(_collate([samples[i] for i in chunk], task, fold, pad_id, tuple(chunk)))
    return batches


def _tokens(sample: Sample, image_tokens: int | None) -> tuple[int, int]:
    """Tokens of a sample: (encoder and image, decoder)."""
    encoder = sample[MASKS[0]].shape[0] if MASKS[0] in sample else 0
    decoder = sample[MASKS[1]].shape[0] if MASKS[1] in sample else 0
    pixels = sample.get("pixel_values")
    if pixels is not None:
        encoder += image_tokens or pixels.shape[-1] * pixels.shape[-2] // PATCH + 1
    return encoder, decoder


def _chunks(
    members: Sequence[int], sizes: Sequence[tuple[int, int]], batch_tokens: int, batch_samples: int | None
) -> Iterator[list[int]]:
    """Consecutive members whose padded size stays within the bounds."""
    chunk: list[int] = []
    longest = (0, 0)
    for i in members:
        grown = (max(longest[0], sizes[i][0]), max(longest[1], sizes[i][1]))
        over = (len(chunk) + 1) * sum(grown) > batch_tokens or len(chunk) == batch_samples
        if chunk and over:
            yield chunk
            chunk, grown = [], sizes[i]
        chunk.append(i)
        longest = grown
    if chunk:
        yield chunk


def _collate(samples: Sequence[Sample], task: int, fold: int, pad_id: int, indices: tuple[int, ...]) -> Batch:
    """Stacks samples, padding what has one entry a token on the right."""
    inputs: dict[str, Tensor] = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        if key in ENCODER + DECODER:
            length = max(value.shape[0] for value in values)
            fill = pad_id if key in (ENCODER[0], DECODER[0]) else 0
            values = [pad(v, (*(0, 0) * (v.ndim - 1), 0, length - v.shape[0]), value=fill) for v in values]
        stacked = torch.stack(values)
        inputs[key] = stacked if stacked.is_floating_point() else stacked.to(torch.int64)
    enc_mask, dec_mask = (inputs[name].bool() if name in inputs else None for name in MASKS)
    return Batch(task, fold, inputs, enc_mask, dec_mask, indices)
