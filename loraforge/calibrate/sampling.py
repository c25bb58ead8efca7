"""Which samples of a calibration set are used, and which fold each belongs to.

Selection follows the IterIS document (`select_long`, `if_balance`, `if_divide`); folds go by the content of a sample,
so the order of the rows and the padding of a file change nothing.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from loraforge.calibrate.checks import DECODER, ENCODER, MASKS, Sample
from loraforge.errors import LoraforgeError

# The document's bounds of `select_long`: so many samples are ranked by length, and so many of them kept.
RANKED, KEPT = 3000, 2000


@dataclass(frozen=True)
class Selection:
    """How samples are chosen.

    Attributes:
        samples_num: Samples a task; None or more than there are means all.
        seed: Seed of every draw.
        shuffle: Draw at random instead of taking the first.
        select_long: Choose among the longer two thirds only (of at most 3000 drawn samples; at most 2000).
        if_balance: The same number a class, floor(samples_num / classes); the last class takes the remainder.
        if_divide: Batches of exactly `inner_num` samples; then inner_num x outer_num must be samples_num.
        inner_num: Samples a batch.
        outer_num: Batches.
    """

    samples_num: int | None = 256
    seed: int = 42
    shuffle: bool = True
    select_long: bool = False
    if_balance: bool = False
    if_divide: bool = False
    inner_num: int = 4
    outer_num: int = 5

    def __post_init__(self) -> None:
        if self.samples_num is not None and self.samples_num < 1:
            raise LoraforgeError("samples_num is out of range", got=self.samples_num, expected="1 or more")
        if self.if_divide and self.inner_num * self.outer_num != self.samples_num:
            raise LoraforgeError(
                "inner_num x outer_num must equal samples_num when if_divide is on",
                got=f"{self.inner_num} x {self.outer_num} for {self.samples_num} samples",
                hint=f"--set samples_num={self.inner_num * self.outer_num}, or --set if_divide=false",
            )

    @property
    def batch_samples(self) -> int | None:
        """Samples a batch, where `if_divide` fixes it."""
        return self.inner_num if self.if_divide else None


def choose(
    selection: Selection, lengths: Sequence[int], labels: Sequence[Hashable] | None, where: object = None
) -> list[int]:
    """Indices of the chosen samples.

    Args:
        selection: How to choose.
        lengths: Length of each sample (characters of its text, or tokens).
        labels: Class of each sample; only `if_balance` needs it.
        where: Source, for messages.

    Raises:
        LoraforgeError: `if_balance` without labels.
    """
    generator = torch.Generator().manual_seed(selection.seed)
    pool = list(range(len(lengths)))
    if selection.select_long:
        drawn = _shuffled(pool, generator)[:RANKED]
        drawn.sort(key=lambda i: lengths[i], reverse=True)
        pool = drawn[: max(1, min(KEPT, len(lengths) * 2 // 3))]
    total = len(pool) if selection.samples_num is None else min(selection.samples_num, len(pool))
    if selection.if_balance:
        return _balanced(pool, total, labels, selection.shuffle, generator, where)
    if total < len(pool) and selection.shuffle:
        pool = _shuffled(pool, generator)
    return pool[:total]


def content_hash(sample: Sample) -> bytes:
    """16 bytes that depend on a sample's names, tokens and values alone: not on padding nor on integer widths.

    Positions whose mask is 0 are left out, and so are the masks.
    """
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(sample):
        if key in MASKS:
            continue
        value = sample[key].detach().cpu()
        mask = sample.get(MASKS[0] if key in ENCODER else MASKS[1]) if key in ENCODER + DECODER else None
        if mask is not None and mask.shape[0] == value.shape[0]:
            value = value[mask.cpu().bool()]
        value = value.to(torch.float64 if value.is_floating_point() else torch.int64).contiguous()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.digest()


def fold_of(sample: Sample, folds: int) -> int:
    """The fold of one sample, by its content alone; folds are balanced on average only."""
    return int.from_bytes(content_hash(sample)[:8], "big") % folds


def assign_folds(samples: Sequence[Sample], folds: int) -> list[int]:
    """A fold for each sample: balanced, the same for any order of the rows, one fold for equal samples.

    Distinct samples are ranked by their content's hash and dealt out in turn; of repeated ones, the most frequent are
    dealt first, each to the fold that has least. With fewer distinct samples than folds, the last folds stay empty.
    """
    if folds < 1:
        raise LoraforgeError("the number of folds is out of range", got=folds, expected="1 or more")
    groups: dict[bytes, list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        groups[content_hash(sample)].append(i)
    sizes = [0] * folds
    assigned = [0] * len(samples)
    for _, members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        fold = sizes.index(min(sizes))
        sizes[fold] += len(members)
        for i in members:
            assigned[i] = fold
    return assigned


def _shuffled(items: list[int], generator: torch.Generator) -> list[int]:
    return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]


def _balanced(
    pool: list[int],
    total: int,
    labels: Sequence[Hashable] | None,
    shuffle: bool,
    generator: torch.Generator,
    where: object,
) -> list[int]:
    """floor(total / classes) samples of each class, the last class taking the remainder; class order by the seed."""
    if labels is None or any(label is None for label in labels):
        raise LoraforgeError(
            "if_balance needs the class of every sample",
            where=where,
            got="no labels",
            expected="a field 'label' in every row",
            hint="name the field with label_field, or --set if_balance=false",
        )
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i in pool:
        members[labels[i]].append(i)
    classes = sorted(members, key=str)
    order = [classes[i] for i in torch.randperm(len(classes), generator=generator).tolist()]
    share = total // len(order)
    chosen: list[int] = []
    for label in order:
        quota = share if label != order[-1] else total - share * (len(order) - 1)
        candidates = _shuffled(members[label], generator) if shuffle else members[label]
        chosen += candidates[:quota]
    return chosen
