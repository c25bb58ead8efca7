"""What takes a closed head's place: nothing, its mean output, or its output on another sample."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError, UsageError
from loraforge.evaluation.batches import plain_model
from loraforge.measure.heads.layout import Attention
from loraforge.measure.importance.exact import Fills
from loraforge.measure.importance.passes import Passes
from loraforge.measure.subjects.batch import Batch
from loraforge.measure.subjects.subject import Subject
from loraforge.measure.subjects.task_rows import HEADED

ABLATIONS = ("zero", "mean", "resample")


def make_fills(name: str, subject: Subject, seed: int = 0) -> Fills:
    """The fills of an ablation.

    Args:
        name: zero | mean | resample.
        subject: Says which tokens are no padding.
        seed: Of the donors of `resample`.

    Raises:
        UsageError: Unknown name, or a single sample to resample from.
    """
    if name == "zero":
        return _Zero()
    if name == "mean":
        return _Mean(subject)
    if name == "resample":
        return _Resample(subject, seed)
    raise UsageError("unknown ablation", where="--ablate", got=name, expected=", ".join(ABLATIONS))


class _Zero:
    """The head adds nothing; bias and residual stay."""

    def prepare(self, passes: Passes, block: str, attentions: Sequence[int]) -> None:
        """Nothing is looked at."""

    def fill(self, number: int, attention: int) -> Tensor | None:
        """Zero."""
        return None


class _Mean:
    """The mean of the head's output over all tokens of the subset that are no padding, the same at every position."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._means: dict[int, Tensor] = {}

    def prepare(self, passes: Passes, block: str, attentions: Sequence[int]) -> None:
        """Goes over the subset once."""
        sums: dict[int, Tensor] = {}
        counts: dict[int, int] = {}
        for number, found in passes.captured(block, attentions):
            for index, x in found.items():
                real = real_tokens(self._subject, passes.batches[number], passes.layout.attentions[index], x)
                kept = x[real].double()
                sums[index] = sums.get(index, torch.zeros_like(kept[0])) + kept.sum(0)
                counts[index] = counts.get(index, 0) + len(kept)
        self._means = {index: total / counts[index] for index, total in sums.items()}

    def fill(self, number: int, attention: int) -> Tensor | None:
        """(n_q * v,)."""
        return self._means[attention]


class _Resample:
    """The head's output on another sample.

    The samples form one ring in a seeded order, so that each has one donor, never itself, whatever the batches are. The
    t-th token of a sample that is no padding gets what its donor has at its own token t modulo its length.
    """

    def __init__(self, subject: Subject, seed: int) -> None:
        rows = sorted(subject.indices)
        if len(rows) < 2:
            got = f"{len(rows)} sample"
            raise UsageError("there is no other sample to take an output from", where="--ablate resample", got=got)
        random.Random(seed).shuffle(rows)
        self._donor = dict(zip(rows, [*rows[1:], rows[0]], strict=True))
        self._subject = subject
        self._batches: list[Batch] = []
        self._ranks: dict[tuple[int, int], Tensor] = {}
        self._outputs: dict[int, dict[int, Tensor]] = {}

    def prepare(self, passes: Passes, block: str, attentions: Sequence[int]) -> None:
        """Goes over the subset once and keeps the outputs of this layer's heads on the CPU."""
        self._batches, self._ranks = passes.batches, {}
        self._outputs = {index: {} for index in attentions}
        held = 0
        for number, found in passes.captured(block, attentions):
            for index, x in found.items():
                real = real_tokens(self._subject, self._batches[number], passes.layout.attentions[index], x)
                self._ranks[number, index] = (real.cumsum(1) - 1).clamp(min=0)
                for row, sample in enumerate(self._batches[number].indices):
                    kept = x[row][real[row]].cpu()
                    held += kept.numel() * kept.element_size()
                    self._outputs[index][sample] = kept
            if held > passes.limit:
                raise LoraforgeError(
                    "the heads' outputs on all samples do not fit", where="--ablate resample",
                    got=f"more than {held} bytes", expected=f"at most {passes.limit}",
                    hint="a smaller --subset, or --ablate mean",
                )  # fmt: skip

    def fill(self, number: int, attention: int) -> Tensor | None:
        """(B, T, n_q * v)."""
        rows = []
        for ranks, sample in zip(self._ranks[number, attention], self._batches[number].indices, strict=True):
            given = self._outputs[attention][self._donor[sample]]
            rows.append(given.to(ranks.device)[ranks % len(given)])
        return torch.stack(rows)


def real_tokens(subject: Subject, batch: Batch, attention: Attention, x: Tensor) -> Tensor:
    """(B, T) bool: which positions of an attention's output are no padding.

    Args:
        subject: The model's configuration says whether it is an encoder-decoder.
        batch: Its inputs have the mask, or the labels that a decoder reads.
        attention: Whose positions.
        x: (B, T, n_q * v), for the shape.
    """
    inputs = batch.inputs
    whole = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if attention.stack == "enc" and "pixel_values" in inputs:
        return whole
    both = bool(getattr(plain_model(subject.model).config, "is_encoder_decoder", False))
    mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    # A classifier of two stacks reads its input in both: its labels are no tokens.
    if both and attention.stack == "dec" and subject.kind not in HEADED:
        given = inputs.get("decoder_attention_mask")
        mask = given if given is not None else None if labels is None else labels.ne(-100)
    # A model that cuts or packs its positions has no mask of ours: all of them count.
    return whole if mask is None or mask.shape != whole.shape else mask.bool()
