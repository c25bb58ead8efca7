"""Calibrated methods (iteris, iteris-plus, regmean, regmean-plus-plus): base, data, engine, result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loraforge.calibrate.base import check_inputs, load_base, prefer_kwargs
from loraforge.calibrate.batches import Batch, make_batches
from loraforge.calibrate.clock import Clock
from loraforge.calibrate.data import CalibrationSet, load_calibration
from loraforge.calibrate.engine import Engine, Monitor
from loraforge.calibrate.generation import complete_batches
from loraforge.calibrate.modules import resolve_modules
from loraforge.calibrate.sampling import Selection, assign_folds
from loraforge.calibrate.trace import trace_model
from loraforge.calibrate.weights import Collecting, Weighting
from loraforge.errors import LoraforgeError, UsageError, did_you_mean
from loraforge.linalg.anderson import AndersonMixer
from loraforge.linalg.factored import norm
from loraforge.linalg.metric import left_subspace
from loraforge.linalg.rank import choose
from loraforge.linalg.spectrum import singular_values
from loraforge.merging.iteris import solve_layer
from loraforge.merging.iteris_params import IterisParams
from loraforge.merging.job import Job
from loraforge.types import LowRank

FEW_TOKENS = 8  # tokens a task and input feature, below which the held-out choice leans on the prior


def merge_calibrated(
    job: Job,
    base: Any,
    calibration: Mapping[str, Any] | Sequence[Any] | None,
    batch_tokens: int,
    template: str | None,
    dry_run: bool,
) -> tuple[dict[str, LowRank], list[dict[str, Any]], dict[str, Any]]:
    """Runs a calibrated method.

    Args:
        job: What was asked and opened.
        base: Base model: folder, id in the local cache, or a module.
        calibration: One source an adapter, by name or in order.
        batch_tokens: Tokens a batch.
        template: Text of a row with its fields in braces.
        dry_run: Plan only.

    Returns:
        Merged modules, per-module report rows, and the method's own part of the report.

    Raises:
        LoraforgeError: No base, no or wrong calibration data, modules that the base lacks.
    """
    params: IterisParams = job.params
    sources = _check(job, base, calibration)
    with job.phase("load base"):
        shapes = {m: next((a.info(m).m, a.info(m).n) for a in job.adapters if m in a.modules_set) for m in job.modules}
        task_type = next((a.task_type for a in job.adapters if a.task_type), None)
        model, config = load_base(
            base, task_type=task_type, wanted=job.modules, shapes=shapes, dtype=params.base_dtype, device=job.device
        )
        modules = resolve_modules(model, job.modules, shapes)
    with job.phase("load data"):
        batches, sets = _batches(job, sources, base, config, model, task_type, batch_tokens, template)
    if dry_run:
        from loraforge.merging.plan import plan_calibrated

        return {}, [], {"plan": plan_calibrated(job, batches), "calibration": _account(sets)}
    with job.phase("load adapters"):
        factors = {m: [None if f is None else f.to(torch.float64).folded() for f in job.load(m)] for m in job.modules}
    options: dict[str, object] = dict(prefer_kwargs(model))
    with job.phase("generate"):
        batches = complete_batches(
            model, config, modules, factors, batches, collect=params.collect, max_new_tokens=params.max_new_tokens
        )
    with job.phase("trace"):
        trace = trace_model(model, modules, [b.inputs for b in batches], options)
    kept: dict[str, float] = {}
    clock = Clock(job.device)
    engine = Engine(
        model=model,
        modules=modules,
        factors=factors,
        batches=batches,
        options=options,
        trace=trace,
        how=collecting(params, job.weights, only_present=job.on_missing == "present"),
        solve=lambda stats, choices: solve_layer(stats, params, choices, clock.part),
        cut=lambda *found: _cut(job, kept, *found),
        monitor=_monitor(params),
        progress=job.progress,
        clock=clock,
    )
    outcome = _run(job, engine, params)
    _warn_few_tokens(job, engine)
    layers = [_row(engine, name, kept[name]) for name in job.modules]
    for name in job.modules:
        job.warnings.extend(job.clamped(name, engine.merged[name].rank))
    report = {
        "iteris": {
            "layers": [engine.layers[name] for name in trace.order],
            "iterations": [{k: _number(v) for k, v in it.items()} for it in engine.iterations],
            **outcome,
            "seconds": clock.seconds,
            "operations": clock.work,
        },
        "calibration": _account(sets),
    }
    return {name: engine.merged[name] for name in job.modules}, layers, report


def _check(job: Job, base: Any, calibration: Mapping[str, Any] | Sequence[Any] | None) -> list[Any]:
    """The calibration sources in the adapters' order, once there is all that a calibrated method needs.

    Raises:
        LoraforgeError: No base model, unusable coefficients, no or too few calibration sets.
    """
    if base is None:
        raise LoraforgeError(
            f"method '{job.row.name}' needs the base model",
            expected="--base MODEL_DIR",
            hint="methods without base and calibration: weighted-average, task-arithmetic, svd, concat",
        )
    if min(job.weights) < 0 or not any(job.weights):
        raise LoraforgeError(
            "calibrated methods need coefficients that are not negative, and one that is positive",
            got=", ".join(f"{w:g}" for w in job.weights),
            hint="a negative weight has a meaning for sums only: use task-arithmetic",
        )
    return _sources(job, calibration)


def _run(job: Job, engine: Engine, params: IterisParams) -> dict[str, Any]:
    """Sweep and verification, or the iteration; what came of it."""
    if params.init == "adapters":
        with job.phase("iterate"):
            converged = engine.iterate()
        if not converged and params.max_iter > 1:
            job.warnings.append(
                f"the iteration did not reach {params.convergence_threshold} in {params.max_iter} solves"
            )
        return {"converged": converged if params.max_iter > 1 else None, "verified": None}
    with job.phase("sweep"):
        engine.sweep()
    if not params.verify:
        return {"converged": None, "verified": None}
    with job.phase("verify"):
        deviation = engine.verify()
    if deviation <= params.convergence_threshold:
        # The inputs that every module was solved on are those of the merged model: G(W) = W.
        engine.iterations[-1]["residual"] = 0.0
        return {"converged": True, "verified": deviation}
    with job.phase("iterate"):
        converged = engine.iterate()
    if not converged:
        job.warnings.append("the sweep is not a fixed point of this model and the iteration did not converge")
    return {"converged": converged, "verified": _number(deviation)}


def collecting(params: IterisParams, coefficients: Sequence[float], *, only_present: bool = False) -> Collecting:
    """What the engine has to collect; with `only_present` an adapter that lacks a module has no say there."""
    weighting = Weighting(params.dcs_sigma, params.dcs_min_ess, params.dcs_kernel, params.dcs_mad_consistent)
    return Collecting(
        coefficients=coefficients,
        folds=params.folds if params.searches else 1,
        lambda_weight=params.lambda_weight,
        rho=None if params.reg_ceof == "auto" else float(params.reg_ceof),
        full_weight=params.with_pretrain_matrix == 1,
        target_merged=params.target == "merged",
        exact_cross_norm=params.alpha_1 != "auto" and params.cross_norm == "exact" and _uses_iso_cross(params),
        offdiag=params.offdiag,
        weighting=weighting if params.use_dcs else None,
        only_present=only_present,
    )


def _uses_iso_cross(params: IterisParams) -> bool:
    """Whether ||C_i||_F enters at all (CAMR's matched and absent cross terms do without)."""
    return not params.use_camr or params.camr_cross == "iso"


def _monitor(params: IterisParams) -> Monitor:
    def mixer() -> AndersonMixer:
        return AndersonMixer(params.mats_history_size, params.mats_regularization, params.mats_reg_mode)

    use = mixer if params.use_mats else None
    return Monitor(params.max_iter, params.convergence_threshold, use, params.mats_scope == "global")


def _cut(
    job: Job,
    kept: dict[str, float],
    name: str,
    basis: Tensor | None,
    state: Tensor,
    factor: Tensor | None,
    left: tuple[Tensor, Tensor] | None,
    rank: int,
) -> LowRank:
    """Factors of basis @ state, re-ranked by the user's rule in the metric of the outputs (or of the weights).

    The full-weight solution is dense and is always cut to R, which the solve has done: here its factors are taken.
    """
    kept[name] = 1.0
    if basis is not None and job.rule.is_lossless:
        return LowRank(basis, state)
    output = job.params.truncate_metric == "output" or job.rule.is_lossless
    U, S = left if left is not None and output else left_subspace(state, factor if output else None)
    limit = min(rank, S.numel())
    m = state.shape[0] if basis is None else basis.shape[0]
    k = limit if job.rule.is_lossless else choose(S[:limit], job.rule, m, state.shape[1])
    # The dense full-weight solution counts as what there was to keep: its cut to R is an error like any other.
    total = float(S.square().sum())
    kept[name] = float(S[:k].square().sum()) / total if total > 0 else 1.0
    U = U[:, :k]
    return LowRank(U if basis is None else basis @ U, U.mT @ state)


def _sources(job: Job, calibration: Mapping[str, Any] | Sequence[Any] | None) -> list[Any]:
    """One calibration source an adapter, in the adapters' order.

    Raises:
        LoraforgeError: None at all, or another number than adapters.
        UsageError: A name that no adapter has.
    """
    expected = "one calibration set an adapter: " + ", ".join(f"{n}=FILE" for n in job.names)
    if not calibration:
        raise LoraforgeError(
            f"method '{job.row.name}' needs calibration data",
            expected=expected,
            hint="give --calibration NAME=FILE once an adapter",
        )
    if len(calibration) != len(job.names):
        raise LoraforgeError(
            "the number of calibration sets is wrong",
            got=f"{len(calibration)} sets",
            expected=f"{len(job.names)}; {expected}",
        )
    if not isinstance(calibration, Mapping):
        return list(calibration)
    unknown = [name for name in calibration if name not in job.names]
    if unknown:
        raise UsageError("a calibration set names no adapter", got=unknown[0], hint=did_you_mean(unknown[0], job.names))
    return [calibration[name] for name in job.names]


def _batches(
    job: Job, sources: Sequence[Any], base: Any, config: Any, model: torch.nn.Module, task_type: str | None,
    batch_tokens: int, template: str | None,
) -> tuple[list[Batch], list[CalibrationSet]]:  # fmt: skip
    """All calibration batches on the device, and the sets they come from."""
    params: IterisParams = job.params
    selection = Selection(
        samples_num=params.samples_num,
        seed=params.seed,
        shuffle=params.shuffle,
        select_long=params.select_long,
        if_balance=params.if_balance,
        if_divide=params.if_divide,
        inner_num=params.inner_num,
        outer_num=params.outer_num,
    )
    sets = []
    for name, source in zip(job.names, sources, strict=True):
        loaded = load_calibration(
            source,
            name=name,
            model_config=config,
            base=None if isinstance(base, torch.nn.Module) else base,
            task_type=task_type,
            max_length=params.max_length,
            template=template,
            selection=selection,
        )
        check_inputs(model, loaded.samples[0], loaded.source)
        sets.append(loaded)
    folds = params.folds if params.searches else 1
    dealt = [assign_folds(s.samples, folds) for s in sets]
    made = make_batches(sets, dealt, batch_tokens=batch_tokens, batch_samples=selection.batch_samples)
    return [_place(b, job.device, getattr(torch, params.base_dtype)) for b in made], sets


def _place(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """The batch on the model's device, float inputs in the model's dtype."""
    inputs = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in batch.inputs.items()}
    masks = [None if m is None else m.to(device) for m in (batch.enc_mask, batch.dec_mask)]
    return replace(batch, inputs=inputs, enc_mask=masks[0], dec_mask=masks[1])


def _warn_few_tokens(job: Job, engine: Engine) -> None:
    """Names the modules whose calibration is thin against their width."""
    thin = []
    for name in job.modules:
        tokens = engine.layers[name]["tokens"]
        width = engine.merged[name].shape[1]
        if isinstance(tokens, list) and min(tokens) < FEW_TOKENS * width:
            thin.append((name, min(tokens), width))
    if thin:
        name, tokens, width = thin[0]
        job.warnings.append(
            f"{len(thin)} of {len(job.modules)} modules have fewer than {FEW_TOKENS} tokens a task and input feature "
            f"(first: {name}, {tokens} tokens for {width} features); more --samples make the result more reliable"
        )


def _row(engine: Engine, name: str, kept: float) -> dict[str, Any]:
    """The report row of one module; `kept_energy` is that of a rank rule, in its metric."""
    pair = engine.merged[name]
    return {
        "module": name,
        "rank": pair.rank,
        "kept_energy": kept,
        "relative_error": math.sqrt(max(1.0 - kept, 0.0)),
        "norm": norm(pair),
        "spectrum": singular_values(pair).tolist(),
    }


def _account(sets: Sequence[CalibrationSet]) -> list[dict[str, Any]]:
    return [
        {"name": s.name, "source": s.source, "sha256": s.sha256, "samples": len(s), "available": s.available}
        for s in sets
    ]


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
