"""`loraforge.merge`: from adapters to a merged adapter. Joins the files, the methods and the calibration."""

from __future__ import annotations

import dataclasses
import os
import resource
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import loraforge
from loraforge.adapters import (
    Adapter,
    all_modules,
    check_compatible,
    open_adapter,
    output_dtype,
    resolve_heads,
    unique_names,
)
from loraforge.errors import LoraforgeError, UsageError, did_you_mean
from loraforge.kernels.backend import kernel_report
from loraforge.linalg.factored import norm, pad, truncate_many
from loraforge.linalg.rank import RankRule
from loraforge.merging.job import Job, Progress
from loraforge.merging.methods import MethodRow, find_method
from loraforge.merging.result import MergeResult
from loraforge.types import LayerInputs, LowRank

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def merge(
    adapters: Sequence[str | os.PathLike[str] | Adapter],
    method: str = "iteris-plus",
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    min_rank: int | None = None,
    max_rank: int | None = None,
    uniform_rank: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    seed: int | None = None,
    base: Any = None,
    calibration: Mapping[str, Any] | Sequence[Any] | None = None,
    samples: int | None = None,
    max_length: int | None = None,
    batch_tokens: int = 2048,
    template: str | None = None,
    params: Mapping[str, Any] | None = None,
    on_missing: str = "zero",
    heads_from: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Merges adapters of one base model into one adapter.

    Args:
        adapters: PEFT folders, in an order that is kept.
        method: A name of `METHODS`.
        weights: w_i, one an adapter, any sign; default 1 for sums and 1/N for averages (c_i = 1 if calibrated).
        rank: Output rank of every module, clamped to what the module can have.
        energy: Keep the least rank with this share of the squared spectrum, in (0, 1].
        min_rank: Lower clamp of the rank.
        max_rank: Upper clamp of the rank.
        uniform_rank: Pad every module with zeros to one rank, for consumers that read a single scale.
        dtype: Dtype of the written factors: auto (that of the adapters), float32, bfloat16, float16 or float64.
        device: auto, cpu, cuda or cuda:i.
        seed: Seed of every random draw.
        base: Base model (folder, id in the local cache, or a module); calibrated methods only.
        calibration: One calibration set an adapter: {name: source} or sources in the adapters' order.
        samples: Calibration samples a task.
        max_length: Tokens a sample.
        batch_tokens: Tokens a batch of the calibration forward.
        template: Text of a row with its fields in braces.
        params: Parameters of the method.
        on_missing: A module that only some adapters have: "zero", "present" or "error".
        heads_from: Adapter whose task heads the merged adapter gets.
        force: Merge although base model or task type differ.
        dry_run: Plan only; nothing is computed or written.
        progress: Called with (stage, detail, done, total).

    Raises:
        UsageError: Unknown method, parameter or option value.
        LoraforgeError: Missing, damaged or contradicting input.
    """
    started = time.perf_counter()
    row = find_method(method)
    parameters = _parameters(
        row,
        dict(params or {}),
        {"samples_num": samples, "max_length": max_length, "seed": seed},
        {"base": base, "calibration": calibration, "samples": samples, "max_length": max_length, "template": template},
    )
    rule = RankRule(rank, energy, 1 if min_rank is None else min_rank, max_rank)
    _check_choice("on_missing", on_missing, ("zero", "present", "error"))
    _check_choice("dtype", dtype, ("auto", *_DTYPES))
    opened = _open(adapters)
    forced = check_compatible(opened, force)
    heads = resolve_heads(opened, heads_from)
    modules = all_modules(opened)
    _check_missing(opened, modules, on_missing)
    job = Job(
        row=row,
        params=parameters,
        adapters=opened,
        names=unique_names(opened),
        modules=modules,
        weights=_weights(row, parameters, weights, len(opened)),
        rule=rule,
        device=_device(device),
        on_missing=on_missing,
        uniform_rank=uniform_rank,
        progress=progress,
        warnings=[*forced, *heads.notes],
    )
    target = output_dtype(opened) if dtype == "auto" else _DTYPES[dtype]
    extra: dict[str, Any] = {}
    if row.needs == "calibration":
        from loraforge.merging.calibrated import merge_calibrated

        merged, layers, extra = merge_calibrated(job, base, calibration, batch_tokens, template, dry_run)
    elif dry_run:
        from loraforge.merging.plan import plan_factored

        merged, layers, extra = {}, [], {"plan": plan_factored(job, target)}
    else:
        merged, layers = _merge_factored(job)
    if uniform_rank and merged:
        widest = max(pair.rank for pair in merged.values())
        merged = {name: pad(pair, widest) for name, pair in merged.items()}
        for layer in layers:
            layer["rank"] = widest
    report = _report(job, merged, layers, seed, time.perf_counter() - started) | extra
    return MergeResult(merged, report, opened, heads, target)


def _parameters(
    row: MethodRow, values: dict[str, Any], drawing: Mapping[str, Any], calibrating: Mapping[str, Any]
) -> Any:
    """The method's parameters; what only calibrated methods read is refused elsewhere.

    Raises:
        UsageError: An unknown parameter, or calibration options for a method that uses none.
    """
    if row.needs == "calibration":
        values |= {key: value for key, value in drawing.items() if value is not None}
    else:
        given = [f"--{name.replace('_', '-')}" for name, value in calibrating.items() if value is not None]
        if given:
            raise UsageError(
                f"method '{row.name}' uses no base model and no calibration data",
                got=", ".join(given),
                hint="leave these options out, or choose iteris-plus",
            )
    return row.make_params(values)


def _merge_factored(job: Job) -> tuple[dict[str, LowRank], list[dict[str, Any]]]:
    """A data-free method over all modules, then the rank rule, in windows of modules."""
    function = job.row.load_function()
    exact: list[LowRank] = []
    rules: list[RankRule] = []
    for done, module in enumerate(job.modules):
        if job.progress is not None:
            job.progress("merging", module, done, len(job.modules))
        with job.phase("read"):
            layer = job.layer(module)
        with job.phase("merge"):
            exact.append(function(layer, job.params))
        rules.append(_rule_of(job, layer))
    if all(rule.is_lossless for rule in rules):
        sizes = [norm(pair) for pair in exact]
        layers: list[dict[str, Any]] = [
            {"module": m, "rank": p.rank, "kept_energy": 1.0, "relative_error": 0.0, "norm": s, "spectrum": None}
            for m, p, s in zip(job.modules, exact, sizes, strict=True)
        ]
        return dict(zip(job.modules, exact, strict=True)), layers
    with job.phase("rank"):
        cut = truncate_many(exact, rules)
    layers = []
    for module, result in zip(job.modules, cut, strict=True):
        size = float(result.spectrum.norm())
        layers.append(
            {
                "module": module,
                "rank": result.rank,
                "kept_energy": result.kept_energy,
                "relative_error": result.error / size if size > 0 else 0.0,
                "norm": size,
                "spectrum": result.spectrum.tolist(),
            }
        )
        job.tell_clamped(module, result.factors.rank)
    return {m: r.factors for m, r in zip(job.modules, cut, strict=True)}, layers


def _rule_of(job: Job, layer: LayerInputs) -> RankRule:
    """The user's rank rule, or the method's default one."""
    if not job.rule.is_lossless or job.row.default_rank == "full":
        return job.rule
    widest = max(f.rank for _, f in layer.present)
    return RankRule(rank=max(widest, job.rule.min_rank))


def _report(
    job: Job, merged: Mapping[str, LowRank], layers: list[dict[str, Any]], seed: int | None, seconds: float
) -> dict[str, Any]:
    """The account of a merge; relative_error and kept_energy are totals over all modules, by squared norms."""
    total = sum(layer["norm"] ** 2 for layer in layers)
    lost = sum((layer["norm"] * layer["relative_error"]) ** 2 for layer in layers)
    relative = (lost / total) ** 0.5 if total > 0 else 0.0
    return {
        "out": None,
        "method": job.row.name,
        "params": dataclasses.asdict(job.params),
        "weights": list(job.weights),
        "adapters": [
            {
                "name": name,
                "path": os.fspath(a.path),
                "sha256": a.sha256,
                "modules": len(a.modules),
                "ranks": sorted({a.info(m).rank for m in a.modules}),
            }
            for name, a in zip(job.names, job.adapters, strict=True)
        ],
        "modules": len(job.modules),
        "rank_max": max((pair.rank for pair in merged.values()), default=0),
        "parameters": sum(pair.B.numel() + pair.A.numel() for pair in merged.values()),
        "relative_error": relative,
        "kept_energy": 1.0 - relative**2,
        "seconds": seconds,
        "phases": job.phases,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device": str(job.device),
        "seed": getattr(job.params, "seed", seed),
        "kernels": kernel_report(),
        "versions": {"loraforge": loraforge.__version__, "torch": torch.__version__},
        "warnings": job.warnings,
        "layers": layers,
    }


def _open(adapters: Sequence[str | os.PathLike[str] | Adapter]) -> list[Adapter]:
    if isinstance(adapters, str | os.PathLike) or not adapters:
        raise LoraforgeError("no list of adapters was given", got=repr(adapters), expected="one or more PEFT folders")
    return [a if isinstance(a, Adapter) else open_adapter(a) for a in adapters]


def _weights(row: MethodRow, params: Any, weights: Sequence[float] | None, count: int) -> list[float]:
    """One weight an adapter; `manual_ceof` of the calibrated methods says the same thing."""
    manual = getattr(params, "manual_ceof", None)
    if weights is not None and manual is not None:
        raise UsageError("--weights and manual_ceof both set the coefficients", hint="give one of the two")
    chosen = weights if weights is not None else manual
    if chosen is None:
        return [1.0 / count if row.default_weight == "mean" else 1.0] * count
    if len(chosen) != count:
        raise LoraforgeError(
            "the number of weights is wrong", got=f"{len(chosen)} weights", expected=f"{count}, one an adapter"
        )
    try:
        values = [float(w) for w in chosen]
    except (TypeError, ValueError) as error:
        raise UsageError("a weight is not a number", got=repr(chosen), expected="one number an adapter") from error
    if not all(w == w and abs(w) != float("inf") for w in values):
        raise LoraforgeError("a weight is not finite", got=values, expected="finite numbers")
    return values


def _check_missing(adapters: Sequence[Adapter], modules: Sequence[str], on_missing: str) -> None:
    """Refuses modules that only some adapters have, if the user asked for that."""
    if on_missing != "error":
        return
    gaps = [f"{m} (not in {', '.join(a.name for a in adapters if m not in a.modules_set)})" for m in modules]
    gaps = [gap for gap, m in zip(gaps, modules, strict=True) if any(m not in a.modules_set for a in adapters)]
    if gaps:
        raise LoraforgeError(
            "some modules are missing from some adapters",
            where="; ".join(gaps[:4]),
            got=f"{len(gaps)} such modules",
            hint="--on-missing zero takes a missing delta as 0",
        )


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(f"unknown value of {name}", got=value, hint=did_you_mean(value, choices))


def _device(name: str) -> torch.device:
    """The device of a name; auto is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError("unknown device", got=name, expected="auto, cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError("unsupported device", got=name, expected="auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise LoraforgeError("this torch sees no GPU", got=name, hint="use --device cpu; `loraforge doctor` says more")
    return device
