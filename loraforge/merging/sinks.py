"""Where a merge goes: into memory, into an adapter folder module by module, or into a copy of the base model."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import loraforge
from loraforge.adapters import AdapterWriter, HeadsPlan
from loraforge.errors import LoraforgeError
from loraforge.linalg.device import ON_CPU, named_when_full
from loraforge.linalg.factored import pad
from loraforge.merging.account import merge_report
from loraforge.merging.job import Job
from loraforge.merging.result import MergeResult, WrittenModules, side_files
from loraforge.merging.stream import Piece, pieces
from loraforge.types import LowRank, Merged


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """What is written.

    Attributes:
        out: Folder, or None for a result in memory.
        overwrite: Replace an earlier output.
        resume: Continue an interrupted run.
        format: "peft", "kohya" or "diffusers".
        dtype: Dtype of the factors.
        asked_dtype: The user's word for it; "auto" keeps a model in its own.
        heads: What becomes of heads.
        seed: The user's seed.
        started: When the merge began (time.perf_counter).
    """

    out: str | os.PathLike[str] | None
    overwrite: bool
    resume: bool
    format: str
    dtype: torch.dtype
    asked_dtype: str
    heads: HeadsPlan
    seed: int | None
    started: float


def held(
    job: Job,
    output: Output,
    merged: Mapping[str, LowRank],
    layers: list[dict[str, Any]],
    biases: Mapping[str, Tensor],
    extra: Mapping[str, Any] | None = None,
) -> MergeResult:
    """A result in memory, the computer's own; with `uniform_rank` every module is padded to the widest."""
    merged = {name: pair.to(device="cpu") for name, pair in merged.items()}
    if job.uniform_rank and merged:
        widest = max(pair.rank for pair in merged.values())
        merged = {name: pad(pair, widest) for name, pair in merged.items()}
        layers = [layer | {"rank": widest} for layer in layers]
    report = merge_report(job, layers, output.seed, time.perf_counter() - output.started) | dict(extra or {})
    report["format"] = output.format
    return MergeResult(merged, report, job.adapters, output.heads, output.dtype, biases)


def to_memory(job: Job, output: Output) -> MergeResult:
    """A data-free merge held in memory; written at the end where there is a folder to write to."""
    merged: dict[str, LowRank] = {}
    rows: list[dict[str, Any]] = []
    biases: dict[str, Tensor] = {}
    for piece in pieces(job):
        merged[piece.module] = _factors(piece)
        rows.append(piece.row)
        if piece.bias is not None:
            biases[piece.module] = piece.bias
    result = held(job, output, merged, rows, biases)
    if output.out is not None:
        result.save(output.out, output.overwrite, output.format)
    return result


def to_disk(job: Job, output: Output) -> MergeResult:
    """A data-free merge written module by module; the memory does not grow with their number."""
    rows: dict[str, dict[str, Any]] = {}
    out = Path(os.fspath(output.out or ""))

    def report() -> dict[str, Any]:
        layers = [rows[module] for module in job.modules]
        found = merge_report(job, layers, output.seed, time.perf_counter() - output.started)
        return found | {"format": output.format}

    kept: dict[str, Any] = {}

    def account() -> dict[str, Any]:
        if not kept:
            kept.update(report())
        return kept

    writer = AdapterWriter(
        out, job.adapters, output.dtype, output.heads, side_files(account, out), output.overwrite,
        format=output.format, resume=output.resume, fingerprint=fingerprint(job, output),
    )  # fmt: skip
    with writer.session(list(job.modules)) as session:
        rows.update(session.finished)
        if rows:
            job.warnings.append(f"continued an interrupted run: {len(rows)} of {len(job.modules)} modules were there")
        for piece in pieces(job, session.finished):
            with job.phase("write"):
                session.add(piece.module, _factors(piece), piece.row, piece.bias)
            rows[piece.module] = piece.row
    modules = WrittenModules(session.report.path, job.modules)
    return MergeResult(modules, account(), job.adapters, output.heads, output.dtype, {}, session.report)


def to_model(job: Job, output: Output, base: Any) -> MergeResult:
    """A data-free merge added to the base; results without a low rank lose nothing."""
    rows: list[dict[str, Any]] = []

    def stream() -> Iterator[tuple[str, Merged, Tensor | None]]:
        for piece in pieces(job, whole=True):
            rows.append(piece.row)
            yield piece.module, piece.update, piece.bias

    def report() -> dict[str, Any]:
        return merge_report(job, rows, output.seed, time.perf_counter() - output.started)

    return _baked(job, output, base, stream(), report)


def result_to_model(job: Job, output: Output, base: Any, result: MergeResult) -> MergeResult:
    """A result in memory added to the base."""
    stream = ((name, pair, result.biases.get(name)) for name, pair in result.modules.items())
    return _baked(job, output, base, stream, lambda: result.report)


def _baked(
    job: Job, output: Output, base: Any, stream: Iterable[tuple[str, Merged, Tensor | None]], report: Any
) -> MergeResult:
    from loraforge.merging.models.bake import bake

    # Rows of what has no low rank are made while they are added.
    with named_when_full(job.device, "adding the merged updates to the base", None, ON_CPU):
        found = bake(
            stream, base, output.out or "", adapters=job.adapters, heads=output.heads, modules=job.modules,
            dtype=output.asked_dtype, device=job.device,
            overwrite=output.overwrite, report=report, progress=job.progress,
        )  # fmt: skip
    return MergeResult({}, found, job.adapters, output.heads, output.dtype)


def fingerprint(job: Job, output: Output) -> dict[str, Any]:
    """What must be equal for a run to be continued: everything that changes a byte of the output."""
    return {
        "loraforge": loraforge.__version__,
        "torch": torch.__version__,
        "method": job.row.name,
        "params": asdict(job.params),
        "weights": list(job.weights),
        "rank_rule": asdict(job.rule) | {"budget": job.budget},
        "post": None if job.post is None else asdict(job.post),
        "adapters": [adapter.sha256 for adapter in job.adapters],
        "base": getattr(job.loader, "sha256", None),
        "stats": [_digest(found) for found in job.stats],
        "keys": list(job.keys),
        "on_missing": job.on_missing,
        "device": job.device.type,
        "format": output.format,
        "dtype": str(output.dtype).removeprefix("torch."),
        "modules": list(job.modules),
    }


def _digest(found: Mapping[str, Tensor]) -> str:
    """SHA-256 over the statistics of one adapter."""
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(name.encode())
        digest.update(found[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _factors(piece: Piece) -> LowRank:
    """The factors of a module that was cut to a low rank, away from the GPU that others need.

    Raises:
        LoraforgeError: It was not (the rank rule left a result without a low rank).
    """
    if not isinstance(piece.update, LowRank):
        raise LoraforgeError("A merged module has no low rank", where=piece.module, got=type(piece.update).__name__)
    return piece.update.to(device="cpu")
