"""What becomes of each tensor of the base when full models are merged, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from loraforge.checkpoints import Alignment, Checkpoint
from loraforge.errors import LoraforgeError
from loraforge.merging.job import Job
from loraforge.merging.models.placing import match_tensors
from loraforge.merging.models.skeleton import Skeleton
from loraforge.merging.models.task_vectors import matrix_shape
from loraforge.merging.row import MethodRow

# The published code takes no singular value decomposition of these; the isotropic family follows it.
NOT_A_MATRIX = "text_projection"


@dataclass(slots=True, eq=False)
class Plan:
    """What becomes of each tensor of the base.

    Attributes:
        matrices: Merged by the method.
        others: Averaged or summed.
        copied: Integers, empty tensors, and what no model has.
    """

    matrices: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)


def make_plan(base: Checkpoint, alignments: Sequence[Alignment], row: MethodRow) -> Plan:
    """Sorts the base's tensors by what the method does with them."""
    plan = Plan()
    for name in base.names:
        if not base.is_float(name) or not base.numel(name) or not any(name in a.names for a in alignments):
            plan.copied.append(name)
        elif row.other_tensors == "method" or _is_matrix(base, name, row):
            plan.matrices.append(name)
        else:
            plan.others.append(name)
    return plan


def _is_matrix(base: Checkpoint, name: str, row: MethodRow) -> bool:
    """Two dimensions, and not what the isotropic papers leave out."""
    return len(base.shape(name)) == 2 and not (row.other_tensors == "mean" and NOT_A_MATRIX in name)


def follow_ties(base: Checkpoint, alignments: Sequence[Alignment], skeleton: Skeleton | None) -> list[Alignment]:
    """Finds a tied weight that the base's files hold twice and a model's files once (older releases wrote both).

    Left alone, the second name would keep the base's values, and a reader that finds two values ties nothing.
    """
    if skeleton is None or not skeleton.tied or not any(found.missing for found in alignments):
        return list(alignments)
    own = match_tensors([*skeleton.tied, *skeleton.tied.values()], base, skeleton)
    pairs = [(own[one], own[other]) for one, other in skeleton.tied.items()]
    single = [(a[0], b[0]) for a, b in pairs if len(a) == len(b) == 1 and a != b]
    twice = [(a, b) for a, b in single if torch.equal(base.read(a), base.read(b))]
    followed = []
    for found in alignments:
        names = dict(found.names)
        for one, other in [*twice, *((b, a) for a, b in twice)]:
            if one not in names and other in found.names:
                names[one] = found.names[other]
        followed.append(replace(found, names=names, missing=tuple(n for n in found.missing if n not in names)))
    return followed


def check_missing(alignments: Sequence[Alignment], names: Sequence[str], on_missing: str) -> None:
    """Refuses models that lack tensors of the base, if the user asked for that.

    Raises:
        LoraforgeError: Naming the models and a tensor of each.
    """
    gaps = [f"{name}: {a.missing[0]}" for name, a in zip(names, alignments, strict=True) if a.missing]
    if gaps and on_missing == "error":
        raise LoraforgeError(
            "Some models lack tensors of the base",
            where="; ".join(gaps[:4]),
            hint="--on-missing zero takes a missing task vector as 0",
        )


def notes_of(names: Sequence[str], alignments: Sequence[Alignment], on_missing: str, *, resume: bool) -> list[str]:
    """What there is to say of names, missing tensors and heads before any tensor is merged."""
    notes = ["a merge of models is not continued: --resume had no effect"] if resume else []
    meaning = "they are merged without it" if on_missing == "present" else "they count as unchanged"
    for name, found in zip(names, alignments, strict=True):
        notes += found.notes
        if found.missing:
            shown = ", ".join(found.missing[:3])
            notes.append(f"{name}: lacks {len(found.missing)} tensors of the base ({shown}); {meaning}")
        if found.own:
            shown = ", ".join(found.own[:3])
            notes.append(f"{name}: {len(found.own)} tensors of its own ({shown}) are kept aside under heads/{name}")
    return notes


def cost_of(job: Job, base: Checkpoint, plan: Plan, dtype: torch.dtype | None) -> dict[str, Any]:
    """What a merge would read, write and hold, in the words of `merging.plan`.

    Returns:
        {modules: [{module, shape, ranks, rank_out, at_most}], peak_bytes, flops, output_bytes, steps}, and the numbers
        of tensors, matrices, others and copied ones.
    """
    count = len(job.adapters)
    cuts = job.post is not None or not job.rule.is_lossless
    rows, flops = [], 0
    for name in plan.matrices:
        m, n = matrix_shape(base.shape(name))
        least = min(m, n)
        rank = min(least, job.rule.rank or least, job.rule.max_rank or least)
        ranks = [least] * sum(name in model.modules_set for model in job.adapters)
        rows.append({"module": name, "shape": [m, n], "ranks": ranks, "rank_out": rank, "at_most": cuts})
        # A sum; and 22 min^2 max for the decomposition of a matrix.
        flops += 2 * count * m * n + (22 * least**2 * max(m, n) if cuts or "R^3" in job.row.cost else 0)
    largest = max((base.numel(name) for name in [*plan.matrices, *plan.others]), default=0)
    size = sum(
        base.numel(n) * (dtype if dtype is not None and base.is_float(n) else base.dtype(n)).itemsize
        for n in base.names
    )
    return {
        "modules": rows, "tensors": len(base.names), "matrices": len(plan.matrices), "others": len(plan.others),
        "copied": len(plan.copied), "output_bytes": size, "peak_bytes": largest * (4 * (count + 2) + 8 * (count + 2)),
        "flops": flops, "steps": ["read models", *(["survey"] if job.row.survey else []), job.row.name,
                                  *(["rank rule"] if cuts else []), "write"],
    }  # fmt: skip
