"""`loraforge.merge`: from adapters (or full checkpoints) to a merged one. Joins files, methods and calibration."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from loraforge.adapters import (
    Adapter,
    HeadsPlan,
    all_modules,
    check_compatible,
    output_dtype,
    resolve_heads,
    unique_names,
)
from loraforge.linalg.device import choose_device, named_when_full
from loraforge.merging import checks, options
from loraforge.merging.job import Job, Progress, Told
from loraforge.merging.methods import find_method
from loraforge.merging.result import MergeResult
from loraforge.merging.sinks import Output, held, result_to_model, to_disk, to_memory, to_model

LESS = "a smaller --batch-tokens, fewer --samples, --set base_dtype=bfloat16, or --device cpu"


def merge(
    adapters: Sequence[str | os.PathLike[str] | Adapter],
    method: str = "iteris-plus",
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    nuclear: float | None = None,
    ratio: float | None = None,
    fro_error: float | None = None,
    budget: int | None = None,
    min_rank: int | None = None,
    max_rank: int | None = None,
    uniform_rank: bool = False,
    post: str = "none",
    dtype: str = "auto",
    device: str = "auto",
    seed: int | None = None,
    base: Any = None,
    calibration: Mapping[str, Any] | Sequence[Any] | None = None,
    stats: Mapping[str, Any] | Sequence[Any] | None = None,
    samples: int | None = None,
    max_length: int | None = None,
    batch_tokens: int = 2048,
    template: str | None = None,
    params: Mapping[str, Any] | None = None,
    on_missing: str = "zero",
    heads_from: str | None = None,
    force: bool = False,
    ignore_unknown: bool = False,
    dry_run: bool = False,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    format: str = "auto",  # noqa: A002
    output_kind: str | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Merges adapters of one base model into one, or full checkpoints into one model.

    Args:
        adapters: PEFT folders or files of adapters (or model folders, with `base`), in an order that is kept.
        method: A name of `METHODS`.
        weights: w_i, one an adapter, any sign; default 1 for sums and 1/N for averages (c_i = 1 if calibrated).
        rank: Output rank of every module, clamped to what the module can have.
        energy: Keep the least rank with this share of the squared spectrum, in (0, 1].
        nuclear: Keep the least rank with this share of the sum of the spectrum, in (0, 1].
        ratio: Keep singular values above the largest over this number.
        fro_error: Keep the least rank with at most this relative Frobenius error.
        budget: Parameters that all modules share, dealt out by what each rank explains.
        min_rank: Lower clamp of the rank.
        max_rank: Upper clamp of the rank.
        uniform_rank: Pad every module with zeros to one rank, for consumers that read a single scale.
        post: "iso" flattens the spectrum of any method's result after the rank rule.
        dtype: Dtype of the written factors: auto (that of the adapters), float32, bfloat16, float16 or float64.
        device: auto, cpu, cuda or cuda:i.
        seed: Seed of every random draw.
        base: Base model (folder, id in the local cache, or a module); for calibrated methods, full checkpoints, DoRA
            adapters and output_kind "model".
        calibration: One calibration set an adapter: {name: source} or sources in the adapters' order.
        stats: One file of input statistics an adapter (`loraforge collect-stats`), by name or in order.
        samples: Calibration samples a task.
        max_length: Tokens a sample.
        batch_tokens: Tokens a batch of the calibration forward.
        template: Text of a row with its fields in braces.
        params: Parameters of the method.
        on_missing: A module that only some adapters have: "zero", "present" or "error".
        heads_from: Adapter whose task heads the merged adapter gets.
        force: Merge although base model or task type differ.
        ignore_unknown: Leave keys out that are no part of an adapter.
        dry_run: Plan only; nothing is computed or written.
        out: Write the result there while it is made, in bounded memory; None keeps it in memory.
        overwrite: Replace an earlier output.
        resume: Continue an interrupted run of the same merge to `out`.
        format: "peft", "kohya", "diffusers", or auto: the format that all adapters share, else PEFT.
        output_kind: "adapter", or "model": base + delta (needs `base` and `out`); default: what the inputs are.
        progress: Called with (stage, detail, done, total).

    Raises:
        UsageError: Unknown method, parameter or option value.
        LoraforgeError: Missing, damaged or contradicting input.
    """
    started = time.perf_counter()
    row = find_method(method)
    for name, value, known in (
        ("on_missing", on_missing, ("zero", "present", "error")),
        ("dtype", dtype, ("auto", *options.DTYPES)),
        ("post", post, ("none", "iso")),
        ("output_kind", output_kind or "adapter", ("adapter", "model")),
        ("format", format, ("auto", "peft", "kohya", "diffusers")),
    ):
        options.check_choice(name, value, known)
    own, rule = options.split_rank_options(
        row,
        {
            "rank": rank, "energy": energy, "nuclear": nuclear, "ratio": ratio, "fro_error": fro_error,
            "min_rank": min_rank, "max_rank": max_rank,
        },
    )  # fmt: skip
    parameters = options.make_parameters(
        row,
        {**own, **(params or {})},
        {"samples_num": samples, "max_length": max_length, "seed": seed},
        {"calibration": calibration, "samples": samples, "max_length": max_length, "template": template},
    )
    checks.check_inputs(row, adapters, weights)
    place = choose_device(device)
    if checks.are_checkpoints(adapters):
        from loraforge.merging.models.merge import merge_models

        checks.refuse_for_models(
            {
                "--output-kind adapter": output_kind == "adapter",
                "--format": format != "auto", "--from": heads_from is not None, "--uniform-rank": uniform_rank,
                "--budget": budget is not None, "--force": force, "--ignore-unknown": ignore_unknown,
            }
        )  # fmt: skip
        report = merge_models(
            [os.fspath(a) for a in adapters if not isinstance(a, Adapter)], row, parameters,
            weights=weights, base=base, out=out, rule=rule,
            post=options.post_params(row, parameters, post), dtype=dtype, device=place, stats=stats,
            on_missing=on_missing, overwrite=overwrite, resume=resume, dry_run=dry_run, seed=seed,
            progress=progress,
        )  # fmt: skip
        return MergeResult({}, report, [], HeadsPlan(), options.DTYPES["float32"])
    kind = output_kind or "adapter"
    opened = checks.open_all(adapters, ignore_unknown)
    forced = check_compatible(opened, force)
    checks.check_base(row, opened, base, kind, out, dry_run=dry_run)
    heads = resolve_heads(opened, heads_from)
    modules = all_modules(opened)
    checks.check_missing(opened, modules, on_missing)
    checks.check_equal_ranks(row, parameters, opened, modules)
    names = unique_names(opened)
    job = Job(
        row=row,
        params=parameters,
        adapters=opened,
        names=names,
        keys=checks.draw_keys([a.path for a in opened]),
        modules=modules,
        weights=options.choose_weights(row, parameters, weights, len(opened)),
        rule=rule,
        device=place,
        on_missing=on_missing,
        uniform_rank=uniform_rank,
        progress=progress,
        post=options.post_params(row, parameters, post),
        budget=options.check_budget(row, budget, rule, uniform_rank=uniform_rank),
        stats=options.load_statistics(row, stats, names, modules),
        loader=options.choose_loader(row, opened, base, rule, kind, place),
        warnings=[
            *forced,
            *heads.notes,
            *(note for a in opened for note in a.notes),
            *options.advice(parameters),
            *checks.silent(opened),
        ],
    )
    target = output_dtype(opened) if dtype == "auto" else options.DTYPES[dtype]
    layout = options.choose_format(format, opened)
    output = Output(out, overwrite, resume, layout, target, dtype, heads, seed, started)
    if row.needs == "calibration" or dry_run:
        result = _calibrated(job, output, base, calibration, batch_tokens, template, dry_run=dry_run)
    elif kind == "adapter":
        return to_disk(job, output) if out is not None and not uniform_rank else to_memory(job, output)
    else:
        return to_model(job, output, base)
    if dry_run or out is None:
        return result
    if kind == "model":
        return result_to_model(job, output, base, result)
    result.save(out, overwrite, output.format)
    return result


def _calibrated(
    job: Job, output: Output, base: Any, calibration: Any, batch_tokens: int, template: str | None, *, dry_run: bool
) -> MergeResult:
    """A calibrated method, or the plan of any."""
    extra: dict[str, Any]
    if job.row.needs == "calibration":
        from loraforge.merging.calibrated import merge_calibrated

        told = Told(job.progress)
        job.progress = told
        with named_when_full(job.device, "calibrating", lambda: told.detail, LESS):
            merged, layers, extra = merge_calibrated(job, base, calibration, batch_tokens, template, dry_run)
        if output.resume:
            job.warnings.append("a calibrated merge is solved in one piece: --resume had nothing to continue")
    else:
        from loraforge.merging.plan import plan_factored

        merged, layers, extra = {}, [], {"plan": plan_factored(job, output.dtype)}
    return held(job, output, merged, layers, {}, extra)
