"""Merges fine-tuned models of one base, tensor by tensor: the same methods, on task vectors W_i - W_0.

A tensor of two dimensions is a matrix: merge_layer gets its task vectors as Dense, the rank rule and the flattening
follow as for adapters, and W_0 + result is written. What becomes of the others (norms, biases, convolutions, and
projections between text and image named "text_projection") is the method's `other_tensors`:

- "mean": alpha * (1/N) sum_i w_i (W_i - W_0), the isotropic papers' rule (arXiv 2502.04959). The weights are factors on
  the task vectors, 1 by default; where a method's default weights are 1/N already, they are not divided again. alpha
  is that of the flattening, 1 without one.
- "sum": alpha * sum_i w_i (W_i - W_0).
- "method": the tensor is a matrix like any other, a vector one row, a convolution (out, in * kernel).

Memory: a tensor of each model in float32, what the method works in (float64 copies of them at most), one of the output.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from loraforge.adapters import unique_names
from loraforge.checkpoints import SHARD_BYTES, Checkpoint, ModelReport, align, open_checkpoint
from loraforge.errors import LoraforgeError
from loraforge.linalg.device import ON_CPU, named_when_full
from loraforge.linalg.rank import RankRule
from loraforge.merging import checks, options
from loraforge.merging.account import merge_report
from loraforge.merging.job import Job, Progress
from loraforge.merging.models.folder import ModelFolder, Rounding, add_rows, keep_aside
from loraforge.merging.models.plan import Plan, check_missing, cost_of, follow_ties, make_plan, notes_of
from loraforge.merging.models.skeleton import Skeleton, read_skeleton
from loraforge.merging.models.task_vectors import BaseWeights, TaskVectors, check_integers, matrix_shape
from loraforge.merging.row import MethodRow
from loraforge.merging.stream import pieces


def merge_models(
    models: Sequence[str | os.PathLike[str]],
    row: MethodRow,
    params: Any,
    *,
    base: str | os.PathLike[str] | None,
    out: str | os.PathLike[str] | None,
    weights: Sequence[float] | None = None,
    rule: RankRule | None = None,
    post: Any = None,
    dtype: str = "auto",
    device: torch.device | None = None,
    stats: Mapping[str, Any] | Sequence[Any] | None = None,
    on_missing: str = "zero",
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    seed: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Merges full models into a model folder.

    Args:
        models: Folders or files of the fine-tuned models, in an order that is kept.
        row: The method, one with `checkpoints`.
        params: Its parameters.
        base: The model that all were fine-tuned from.
        out: Folder to make.
        weights: w_i; default 1, or 1/N where the method averages.
        rule: Rank rule on every merged matrix; default none.
        post: Parameters of the flattening, or None.
        dtype: Dtype of the written floating point tensors; auto is the base's own, tensor by tensor.
        device: Where to compute.
        stats: Input statistics, one file (or mapping of module to vector) a model, by name or in order. A module is the
            tensor's name in memory without ".weight".
        on_missing: A tensor that a model lacks: "zero" (its task vector is 0), "present" (averages run over the models
            that have it) or "error".
        shard_bytes: Largest size of one file of the output.
        overwrite: Replace an earlier output.
        resume: Noted only: a merge of models starts again.
        dry_run: Say what would be done; write nothing.
        seed: The user's seed, for the report.
        progress: Called with (stage, detail, done, total).

    Returns:
        The report, with the keys of `merge --json`.

    Raises:
        LoraforgeError: Missing, damaged or contradicting input, or an output that exists.
    """
    started = time.perf_counter()
    if not row.checkpoints:
        raise LoraforgeError(
            f"method '{row.name}' does not merge full models", hint="`loraforge methods` lists those that do"
        )
    if base is None:
        raise LoraforgeError("Full models are merged as differences from their base", expected="--base MODEL_DIR")
    opened = [open_checkpoint(model) for model in models]
    origin = open_checkpoint(base)
    alignments = [align(origin, model) for model in opened]
    # It takes seconds: only where something asks for it.
    skeleton = read_skeleton(origin) if stats is not None or any(a.missing for a in alignments) else None
    alignments = follow_ties(origin, alignments, skeleton)
    check_integers(origin, opened, alignments)
    plan = make_plan(origin, alignments, row)
    place = device or torch.device("cpu")
    weights_of = BaseWeights(origin, place)
    vectors = [TaskVectors(weights_of, m, a, plan.matrices) for m, a in zip(opened, alignments, strict=True)]
    names = unique_names(cast(Any, vectors))
    check_missing(alignments, names, on_missing)
    job = Job(
        row=row,
        params=params,
        adapters=cast(Any, vectors),  # a task vector answers everything that a data-free merge asks of an adapter
        names=names,
        keys=checks.draw_keys([model.path for model in opened]),
        modules=plan.matrices,
        weights=options.choose_weights(row, params, weights, len(opened)),
        rule=rule or RankRule(),
        device=place,
        on_missing=on_missing,
        uniform_rank=False,
        progress=progress,
        post=post,
        stats=_statistics(stats, names, plan.matrices, row, skeleton),
        warnings=[*notes_of(names, alignments, on_missing, resume=resume), *options.advice(params, models=True)],
    )
    target = None if dtype == "auto" else options.DTYPES[dtype]
    if dry_run:
        return _planned(job, origin, plan, target)
    if out is None:
        raise LoraforgeError("A merged model is written while it is made", expected="an output folder (out)")
    inputs = [*(model.path for model in opened), origin.path]
    folder = ModelFolder(out, origin, target, shard_bytes, overwrite=overwrite, inputs=inputs)
    return _written(job, folder, plan, weights_of, dtype, seed, started)


def _planned(job: Job, base: Checkpoint, plan: Plan, dtype: torch.dtype | None) -> dict[str, Any]:
    """The report of a dry run. It has no hashes: they would take the time of reading every model."""
    models = [{"name": name, "path": os.fspath(m.path)} for name, m in zip(job.names, job.adapters, strict=True)]
    return {
        "out": None, "output_kind": "model", "method": job.row.name, "weights": list(job.weights),
        "base": str(base.path), "adapters": models, "warnings": job.warnings, "plan": cost_of(job, base, plan, dtype),
    }  # fmt: skip


def _written(
    job: Job, folder: ModelFolder, plan: Plan, base: BaseWeights, dtype: str, seed: int | None, started: float
) -> dict[str, Any]:
    """Merges and writes everything; the report."""
    rows: list[dict[str, Any]] = []

    def account(written: ModelReport, rounding: float) -> dict[str, Any]:
        return _report(job, base.checkpoint, rows, seed, started) | {
            "out": os.fspath(folder.out), "dtype": "as the base" if folder.dtype is None else dtype,
            "rounding": rounding, "bytes": written.bytes, "files": list(written.files),
            "parameters": written.parameters,
        }  # fmt: skip

    def aside(place: Path) -> None:
        for name, model in zip(job.names, cast(Sequence[TaskVectors], job.adapters), strict=True):
            if model.alignment.own:
                keep_aside(place / "heads" / name, model.checkpoint, model.alignment.own)

    with named_when_full(job.device, "merging models", lambda: _next(job, rows), ON_CPU):
        return folder.write(_tensors(job, plan, base, rows), aside, account)


def _next(job: Job, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The matrix that is merged once those of `rows` are."""
    return job.modules[min(len(rows), len(job.modules) - 1)] if job.modules else None


def _tensors(
    job: Job, plan: Plan, base: BaseWeights, rows: list[dict[str, Any]]
) -> Iterator[tuple[str, Tensor, Rounding]]:
    """Every tensor of the output, in the order of the base's names; fills `rows` on the way."""
    matrices, others = set(plan.matrices), set(plan.others)
    merged = pieces(job, whole=True)
    for name in base.checkpoint.names:
        if name in matrices:
            piece = next(merged)
            # Spectra of full matrices would make the report larger than some of the tensors.
            rows.append(piece.row | {"spectrum": None})
            weight = base.read(name).clone()
            add_rows(weight.view(matrix_shape(tuple(weight.shape))), piece.update)
            del piece
            yield name, weight, Rounding.COUNTED
        elif name in others:
            yield name, base.read(name) + _other(job, name), Rounding.COUNTED
        else:
            yield name, base.checkpoint.read(name), Rounding.COPIED


def _other(job: Job, name: str) -> Tensor:
    """The merged update of a tensor that is no matrix."""
    models = cast(Sequence[TaskVectors], job.adapters)
    present = [(w, m) for w, m in zip(job.weights, models, strict=True) if name in m.alignment.names]
    share = 1.0 if job.post is None else float(job.post.alpha)
    count = len(present) if job.on_missing == "present" else len(models)
    if job.row.other_tensors == "mean" and job.row.default_weight == "one":
        share /= count
    elif job.row.default_weight == "mean" and job.on_missing == "present":
        total = sum(w for w, _ in present)
        share *= sum(job.weights) / total if total else 1.0
    deltas = (model.delta(name) * (w * share) for w, model in present)
    found = next(deltas)
    for delta in deltas:
        found = found + delta
    return found


def _statistics(
    stats: Mapping[str, Any] | Sequence[Any] | None,
    names: Sequence[str],
    matrices: Sequence[str],
    row: MethodRow,
    skeleton: Skeleton | None,
) -> list[dict[str, Tensor]]:
    """Input statistics by tensor name. A lookup table has none: its inputs are indices.

    Raises:
        LoraforgeError: Another number than models, or a matrix without statistics.
    """
    if stats is None:
        return []
    renamed = {} if skeleton is None else skeleton.names
    modules = {name: renamed.get(name, name).removesuffix(".weight") for name in matrices}
    wanted = [module for module in modules.values() if "embed" not in module.rpartition(".")[2]]
    found = options.load_statistics(row, stats, names, wanted)
    return [{name: one[module] for name, module in modules.items() if module in one} for one in found]


def _report(job: Job, base: Checkpoint, rows: list[dict[str, Any]], seed: int | None, started: float) -> dict[str, Any]:
    models = cast(Sequence[TaskVectors], job.adapters)
    job.warnings += [note for model in models for note in model.doubts()]
    report = merge_report(job, rows, seed, time.perf_counter() - started)
    for entry, model in zip(report["adapters"], models, strict=True):
        entry["files"] = model.checkpoint.sha256s
    return report | {"output_kind": "model", "base": str(base.path), "base_sha256": base.sha256s}
