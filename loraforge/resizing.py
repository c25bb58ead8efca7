"""`loraforge.resize`: an adapter at another rank, by the best approximation of every module.

The full spectrum of each delta is known from its factors, so its error is known exactly before anything is written,
and a budget can be shared over all modules.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

import loraforge
from loraforge.adapters import (
    Adapter,
    AdapterWriter,
    WriteReport,
    model_card,
    open_adapter,
    output_dtype,
    resolve_heads,
)
from loraforge.adapters.keys import shorten
from loraforge.errors import LoraforgeError, UsageError
from loraforge.kernels.backend import kernel_report
from loraforge.linalg.budget import share_budget
from loraforge.linalg.device import ON_CPU, choose_device, named_when_full, peak_bytes
from loraforge.linalg.factored import Truncated, pad, truncate_many
from loraforge.linalg.rank import RankRule, choose
from loraforge.linalg.spectrum import singular_values

Progress = Callable[[str, str, int, int], None]
WINDOW_BYTES = 64 * 2**20  # float64 factors of the modules that are worked on together


def resize(
    src: str | os.PathLike[str] | Adapter,
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    nuclear: float | None = None,
    ratio: float | None = None,
    fro_error: float | None = None,
    budget: int | None = None,
    min_rank: int = 1,
    max_rank: int | None = None,
    uniform_rank: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    format: str = "auto",  # noqa: A002
    overwrite: bool = False,
    ignore_unknown: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes an adapter at another rank, by module the nearest one in Frobenius norm.

    Args:
        src: Adapter of any format that `open_adapter` reads.
        out: Folder to make.
        rank: Rank of every module, as far as it has one.
        energy: Smallest rank that keeps this share of sum S^2, in (0, 1].
        nuclear: Smallest rank that keeps this share of sum S, in (0, 1].
        ratio: Keep S_i > S_1 / ratio.
        fro_error: Smallest rank with at most this relative Frobenius error, by module.
        budget: Parameters of the whole adapter, shared over its modules so that the total error is least.
        min_rank: Lower clamp of the rank.
        max_rank: Upper clamp of the rank.
        uniform_rank: Pad all modules with zeros to one rank.
        dtype: Of the written factors: auto (that of the source), float32, bfloat16 or float16.
        device: auto, cpu, cuda or cuda:i.
        format: Of the output: auto (that of the source), peft, kohya or diffusers.
        overwrite: Replace an earlier output.
        ignore_unknown: Leave out keys of the source that belong to nothing.
        progress: Called with (stage, module, done, total).

    Returns:
        JSON-ready, the content of run.json: out, params, adapters, modules, rank_max, parameters, parameters_before,
        relative_error, kept_energy, dtype, rounding, bytes, device, peak_device_bytes, kernels, seconds, warnings, and
        `layers`, a row a module. Errors are those of the cut; `rounding` is that of the cast to the written dtype.

    Raises:
        LoraforgeError: The source cannot be read, has DoRA magnitudes, or the budget is too small.
        UsageError: No rule, two of them, or a value out of range.
    """
    started = time.perf_counter()
    rule = RankRule(rank, energy, min_rank, max_rank, nuclear, ratio, fro_error)
    _check_rule(rule, budget, uniform_rank=uniform_rank)
    place = choose_device(device)
    adapter = src if isinstance(src, Adapter) else open_adapter(src, ignore_unknown=ignore_unknown)
    _check_plain(adapter)
    rules: Mapping[str, RankRule] = dict.fromkeys(adapter.modules, rule)
    if budget is not None or uniform_rank:
        rules = _planned(adapter, rule, budget, place, progress)
    width = max(r.rank or 0 for r in rules.values()) if uniform_rank else 0
    heads = resolve_heads([adapter])
    opening = _opening(adapter, out, rule, budget, width)
    own = adapter.format if adapter.format in ("kohya", "diffusers") else "peft"

    def account(written: WriteReport) -> dict[str, Any]:
        clamped = [] if uniform_rank else _clamped(rule, written.ranks)
        totals = {
            "device": str(place), "peak_device_bytes": peak_bytes(place), "kernels": kernel_report(),
            "warnings": [*adapter.notes, *heads.notes, *clamped], "seconds": time.perf_counter() - started,
        }  # fmt: skip
        return opening | _closing(written, adapter) | totals

    writer = AdapterWriter(
        out,
        [adapter],
        output_dtype([adapter], dtype),
        heads,
        {
            "run.json": lambda written: json.dumps(account(written), indent=1, allow_nan=False) + "\n",
            "README.md": lambda written: model_card(account(written)),
        },
        overwrite,
        format=own if format == "auto" else format,
    )
    with writer.session(adapter.modules) as session:
        for done, (module, cut) in enumerate(_cut(adapter, rules, place, width), 1):
            info, bias = adapter.info(module), adapter.bias(module)
            scaled = None if bias is None else bias.to(torch.float32) * info.scaling
            session.add(module, cut.factors, _row(adapter, module, cut, cut.factors.rank), scaled)
            if progress is not None:
                progress("resize", module, done, len(adapter.modules))
    return account(session.report)


def _check_rule(rule: RankRule, budget: int | None, *, uniform_rank: bool) -> None:
    """Refuses a resize without a rule, and a budget beside another goal.

    Raises:
        UsageError: Naming the options.
    """
    goals = [name for name in ("rank", "energy", "nuclear", "ratio", "fro_error") if getattr(rule, name) is not None]
    if budget is None and rule.is_lossless and not uniform_rank:
        raise UsageError(
            "Nothing says which rank the adapter gets",
            expected="--rank, --energy, --nuclear, --ratio, --fro-error, --budget or --max-rank",
        )
    if budget is not None and uniform_rank:
        raise UsageError(
            "A budget deals out ranks by worth, so it excludes one rank for all modules",
            got="budget and uniform_rank",
            expected="one of the two",
        )
    if budget is not None and goals:
        raise UsageError(
            "A budget is a rank rule of its own",
            where=", ".join(goals),
            got=f"budget={budget} and {', '.join(f'{name}={getattr(rule, name)}' for name in goals)}",
            expected="one of them; --min-rank and --max-rank go with both",
        )


def _check_plain(adapter: Adapter) -> None:
    """Refuses DoRA: its update is not B A alone.

    Raises:
        LoraforgeError: Naming modules with magnitudes.
    """
    if adapter.has_dora:
        raise LoraforgeError(
            "A DoRA adapter cannot be resized",
            where=adapter.weights_path,
            got=shorten(module for module in adapter.modules if adapter.info(module).has_magnitude),
            expected="LoRA factors alone; a magnitude acts on the base weight too",
            hint="`loraforge merge` with --base turns it into plain factors",
        )


def _planned(
    adapter: Adapter, rule: RankRule, budget: int | None, device: torch.device, progress: Progress | None
) -> dict[str, RankRule]:
    """A fixed rank for every module, from the spectra of all of them."""
    spectra, shapes, ranks = {}, {}, {}
    for done, module in enumerate(adapter.modules, 1):
        pair = adapter.load(module)
        dtype = torch.float64 if pair.B.dtype == torch.float64 else torch.float32
        with named_when_full(device, "decomposing", module, ON_CPU):
            spectra[module] = singular_values(pair.to(device=device)).to("cpu", dtype)
        shapes[module] = pair.shape
        ranks[module] = choose(spectra[module], rule, *pair.shape)
        if progress is not None:
            progress("spectra", module, done, len(adapter.modules))
    if budget is not None:
        ranks = share_budget(spectra, shapes, budget, rule.min_rank, rule.max_rank)
    return {module: RankRule(rank=k, min_rank=min(rule.min_rank, k)) for module, k in ranks.items()}


def _cut(
    adapter: Adapter, rules: Mapping[str, RankRule], device: torch.device, width: int
) -> Iterator[tuple[str, Truncated]]:
    """Every module cut by its rule, in windows of modules, so that memory does not grow with their number.

    Args:
        adapter: The source.
        rules: One rule a module.
        device: Where to compute; what comes is in the computer's own memory.
        width: Least rank, by columns of zeros.
    """
    for window in _windows(adapter):
        with named_when_full(device, "cutting", window[0], ON_CPU):
            updates = [adapter.load(module).to(device=device) for module in window]
            cuts = truncate_many(updates, [rules[module] for module in window])
            factors = [pad(cut.factors, max(width, cut.factors.rank)).to(device="cpu") for cut in cuts]
            cuts = [
                replace(cut, factors=pair, spectrum=cut.spectrum.cpu()) for cut, pair in zip(cuts, factors, strict=True)
            ]
        yield from zip(window, cuts, strict=True)


def _windows(adapter: Adapter) -> Iterator[Sequence[str]]:
    """Neighbouring modules whose factors fit into WINDOW_BYTES; at least one."""
    window: list[str] = []
    size = 0
    for module in adapter.modules:
        info = adapter.info(module)
        needed = 8 * info.rank * (info.m + info.n)
        if window and size + needed > WINDOW_BYTES:
            yield window
            window, size = [], 0
        window.append(module)
        size += needed
    yield window


def _row(adapter: Adapter, module: str, cut: Truncated, rank: int) -> dict[str, Any]:
    info, norm = adapter.info(module), float(cut.spectrum.norm())
    return {
        "module": module,
        "shape": [info.m, info.n],
        "rank_before": info.rank,
        "rank": rank,
        "relative_error": cut.error / norm if norm > 0 else 0.0,
        "kept_energy": cut.kept_energy,
        "norm": norm,
        "spectrum": cut.spectrum.tolist(),
    }


def _opening(
    adapter: Adapter, out: str | os.PathLike[str], rule: RankRule, budget: int | None, width: int
) -> dict[str, Any]:
    """The report as far as it is known before the first module."""
    infos = [adapter.info(module) for module in adapter.modules]
    params = {name: value for name, value in asdict(rule).items() if value is not None}
    params |= {name: value for name, value in (("budget", budget), ("uniform_rank", width)) if value}
    return {
        "out": os.fspath(out),
        "method": "resize",
        "params": params,
        "adapters": [
            {"name": adapter.name, "path": os.fspath(adapter.path), "format": adapter.format, "sha256": adapter.sha256}
        ],
        "base": adapter.base,
        "modules": len(infos),
        "parameters_before": sum(info.rank * (info.m + info.n) for info in infos),
        "versions": {"loraforge": loraforge.__version__, "torch": torch.__version__},
    }


def _closing(written: WriteReport, adapter: Adapter) -> dict[str, Any]:
    """The report's totals, by squared norms over all modules."""
    layers = [written.rows[module] for module in adapter.modules]
    total = math.fsum(row["norm"] ** 2 for row in layers)
    lost = math.fsum((row["norm"] * row["relative_error"]) ** 2 for row in layers)
    relative = math.sqrt(lost / total) if total > 0 else 0.0
    return {
        "rank_max": max(row["rank"] for row in layers),
        "parameters": sum(row["rank"] * sum(row["shape"]) for row in layers),
        "relative_error": relative,
        "kept_energy": 1.0 - relative**2,
        "dtype": written.dtype,
        "rounding": written.rounding,
        "bytes": written.bytes,
        "layers": layers,
    }


def _clamped(rule: RankRule, ranks: Mapping[str, int]) -> list[str]:
    """A sentence where modules could not have the rank that was asked for."""
    low = [
        module for module, k in ranks.items() if rule.rank is not None and k < min(rule.rank, rule.max_rank or k + 1)
    ]
    return [f"rank {rule.rank} is more than {len(low)} modules have: {shorten(low, 3)}"] if low else []
