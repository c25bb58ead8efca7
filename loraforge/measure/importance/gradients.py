"""What gradients by the heads' gates say: plasticity, Fisher information and first-order importance of every head."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loraforge.errors import LoraforgeError, UsageError, did_you_mean, raise_problems
from loraforge.measure.files import PACKAGES, json_number, write_json, write_lines
from loraforge.measure.importance.backward import Progress, gate_gradients
from loraforge.measure.importance.estimates import Estimate, Fisher, GateGradients, fisher, michel, taylor
from loraforge.measure.subjects.batch import ORDERS
from loraforge.measure.subjects.objectives import make_objective
from loraforge.measure.subjects.subject import Subject
from loraforge.provenance import versions

__all__ = ["Estimate", "Fisher", "GateGradients", "fisher", "gate_gradients", "measure_fisher", "michel", "taylor"]

PROFILES = ("default", "document")
MODES = ("sample", "batch")
_DOCUMENT_ROWS = 16


def measure_fisher(
    subject: Subject,
    *,
    objective: str = "task",
    profile: str = "default",
    mode: str | None = None,
    batch_size: int | None = None,
    order: str | None = None,
    train_mode: bool | None = None,
    eps: float = 1e-6,
    relative: bool | None = None,
    probe_steps: int = 200,
    seed: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Plasticity and Fisher information of every head.

    Args:
        subject: Model and rows.
        objective: Of `make_objective`, but kl.
        profile: `default`: a gradient a row, in evaluation mode, eps relative. `document`: gradients of the mean losses
            of batches of 16 rows in the subset's order, dropout on, eps as it is, the document's keys alone. What is
            given beside it wins.
        mode: `sample` or `batch`.
        batch_size: Rows a batch.
        order: `length` or `given`.
        train_mode: Dropout on, drawn by `seed`.
        eps: Of Ppred = G^2 / (F + eps).
        relative: Whether eps is a share of the largest F.
        probe_steps: Of the objective probe.
        seed: Of dropout and probe.
        out: File of the lines; NAME.meta.json beside it says how they were made.
        overwrite: Replace them.
        progress: Called with (stage, detail, done, total).

    Returns:
        One line a head, in the layout's order: {layer, head, G, F, Ppred, n_batches, mode, n_samples, S, M, stack,
        kind}; n_batches counts gradients.

    Raises:
        UsageError: An unknown profile, mode, order or objective.
        LoraforgeError: The output exists; an objective that does not fit; heads that the document's keys cannot name.
        CheckFailed: A loss or gradient that is not finite.
    """
    started = time.perf_counter()
    document = profile == "document"
    how = _How(
        profile=profile,
        mode=mode or ("batch" if document else "sample"),
        batch_size=batch_size or (_DOCUMENT_ROWS if document else subject.batch_size),
        order=order or ("given" if document else subject.order),
        train_mode=document if train_mode is None else train_mode,
        seed=seed,
        eps=eps,
        relative=not document if relative is None else relative,
    )
    how.check(subject)
    path = None if out is None else Path(out)
    if path is not None and path.exists() and not overwrite:
        raise LoraforgeError("the output exists", where=path, hint="choose another path, or add --overwrite")
    loss = make_objective(objective, subject, probe_steps=probe_steps, seed=seed)
    gradients = gate_gradients(
        subject, loss, per_sample=how.mode == "sample", batch_size=how.batch_size, order=how.order,
        train_mode=how.train_mode, seed=seed, progress=progress,
    )  # fmt: skip
    found = fisher(gradients, eps=eps, relative=how.relative)
    lines = _lines(found, gradients, document)
    if path is not None:
        about = {
            **asdict(how), **loss.record, "eps_added": found.eps, "loss": float(gradients.losses.mean()),
            "gradients": len(gradients.s), "n_samples": gradients.n_samples, "rows": list(subject.indices),
            "subject": subject.record, "layout_sha256": subject.layout.sha256, "versions": versions(*PACKAGES),
            "seconds": time.perf_counter() - started,
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path.with_name(f"{path.stem}.meta.json"), about)
        write_lines(path, lines)
    return lines


@dataclass(frozen=True)
class _How:
    """Settings of a measurement, all settled."""

    profile: str
    mode: str
    batch_size: int
    order: str
    train_mode: bool
    seed: int
    eps: float
    relative: bool

    def check(self, subject: Subject) -> None:
        """Refuses unknown words, and the document's lines for a model whose heads they cannot name."""
        known = {"profile": PROFILES, "mode": MODES, "order": ORDERS}
        given = {key: str(getattr(self, key)) for key in known}
        problems: list[LoraforgeError] = [
            UsageError(f"unknown {key} '{given[key]}'", hint=did_you_mean(given[key], words))
            for key, words in known.items()
            if given[key] not in words
        ]
        raise_problems(problems)
        if self.profile == "document" and not subject.layout.is_plain:
            raise LoraforgeError("layer and head alone do not name this model's heads", where="--profile document",
                                 got=subject.layout.family, hint="--profile default")  # fmt: skip


def _lines(found: Fisher, gradients: GateGradients, document: bool) -> list[dict[str, Any]]:
    """One line a head."""
    lines = []
    for i, key in enumerate(found.heads):
        line: dict[str, Any] = {
            "layer": key.layer, "head": key.head, "G": found.g[i], "F": found.f[i], "Ppred": found.p[i],
            "n_batches": len(gradients.s),
        }  # fmt: skip
        if not document:
            line |= {"mode": gradients.mode, "n_samples": gradients.n_samples, "S": found.s[i], "M": found.m[i]}
            line |= {"stack": key.stack, "kind": key.kind}
        lines.append(json_number({k: float(v) if isinstance(v, np.floating) else v for k, v in line.items()}))
    return lines
