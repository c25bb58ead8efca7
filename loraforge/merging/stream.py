"""A data-free merge as a stream of merged modules: survey, method, rank rule, flattening, by windows of modules.

Nothing is kept of a module that was handed on, so the peak memory is that of one window, whatever the number of
modules. The result does not depend on how modules are cut in windows or on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loraforge.linalg.budget import share_budget
from loraforge.linalg.device import ON_CPU, named_when_full
from loraforge.linalg.factored import Truncated, norm, truncate_many
from loraforge.linalg.flatten import NULL, cut_gap, flatten_update
from loraforge.linalg.pool import pool_map
from loraforge.linalg.randomized import Approximation
from loraforge.linalg.rank import RankRule
from loraforge.linalg.sketch import low_rank
from loraforge.merging.job import Job
from loraforge.types import LayerInputs, LowRank, Merged

WINDOW_BYTES = 64 * 2**20  # float64 factors of the modules that are worked on together
GAP = 1e-6  # singular values nearer than this share of the largest are equal: which is cut is arbitrary


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One merged module.

    Attributes:
        module: Its name.
        update: The merged delta, scaling 1.
        row: Its row of the report: rank, kept_energy, relative_error, norm, spectrum, notes.
        bias: (m,) merged lora_bias, or None.
    """

    module: str
    update: Merged
    row: dict[str, Any]
    bias: Tensor | None


def pieces(job: Job, done: Container[str] = (), *, whole: bool = False) -> Iterator[Piece]:
    """Merges the modules of a job, in order.

    Args:
        job: A data-free method.
        done: Modules to leave out (an earlier run finished them).
        whole: Give results without a low rank as they are where no rank rule asks for one (for writing a model).
    """
    modules = [m for m in job.modules if m not in done]
    context = _survey(job) if modules else None
    rules: dict[str, RankRule] = {}
    if job.budget is not None and modules:
        rules = _share(job, context)
    count = len(job.modules) - len(modules)
    for window in windows(job, modules):
        with _on_device(job, window):
            layers, merged = _merge(job, window, context)
            with job.phase("rank"):
                found = _cut(job, layers, merged, rules, whole=whole)
        for layer, (update, row) in zip(layers, found, strict=True):
            yield Piece(layer.module, update, _with_loss(row, job.lost(layer.module)), job.bias(layer.module))
            count += 1
            job.tell("merging", layer.module, count, len(job.modules))
        del layers, merged, found, layer, update  # nothing of this window is alive while the next one is read


def windows(job: Job, modules: Sequence[str]) -> Iterator[list[str]]:
    """Neighbouring modules whose stacked factors fit into WINDOW_BYTES; at least one."""
    window: list[str] = []
    size = 0
    for module in modules:
        infos = [a.info(module) for a in job.adapters if module in a.modules_set]
        needed = 8 * sum(i.rank for i in infos) * (infos[0].m + infos[0].n)
        if window and size + needed > WINDOW_BYTES:
            yield window
            window, size = [], 0
        window.append(module)
        size += needed
    if window:
        yield window


def _on_device(job: Job, window: Sequence[str]) -> AbstractContextManager[None]:
    """What computes on the modules of a window: says which they were where the device has no room for them."""
    where = window[0] if len(window) == 1 else f"{window[0]} to {window[-1]}"
    return named_when_full(job.device, "merging", where, ON_CPU)


def _survey(job: Job) -> Any:
    """What the method has to know of all modules before the first is merged."""
    survey = job.row.load_survey()
    if survey is None:
        return None

    def layers() -> Iterator[LayerInputs]:
        for done, module in enumerate(job.modules):
            seen[:] = [module]
            job.tell("survey", module, done, len(job.modules))
            yield job.layer(module)

    seen: list[str] = []
    with job.phase("survey"), named_when_full(job.device, "looking at all modules", lambda: "".join(seen), ON_CPU):
        return survey(layers, job.params)


def _merge(job: Job, window: Sequence[str], context: Any) -> tuple[list[LayerInputs], list[Merged]]:
    """The method on the modules of a window, over all threads."""
    function = job.row.load_function()
    with job.phase("read"):
        layers = [job.layer(module, context) for module in window]
        if job.post is not None:
            # What is flattened lifts small singular values: their sum must not be rounded before.
            layers = [_widened(layer, _stored_dtype(job, layer.module)) for layer in layers]
    with job.phase("merge"):
        return layers, pool_map(lambda layer: function(layer, job.params), layers)


def _share(job: Job, context: Any) -> dict[str, RankRule]:
    """The rank of every module under the budget that all share, from the full spectra."""
    spectra: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, int]] = {}
    unposted = replace(job, post=None, rule=RankRule(), progress=None, warnings=[])
    for window in windows(job, job.modules):
        with _on_device(job, window):
            layers, merged = _merge(job, window, context)
            with job.phase("rank"):
                cut = _truncate(unposted, layers, merged, [RankRule()] * len(layers))
        for layer, result in zip(layers, cut, strict=True):
            spectra[layer.module], shapes[layer.module] = result.spectrum, layer.shape
            job.tell("spectra", layer.module, len(spectra), len(job.modules))
    ranks = share_budget(spectra, shapes, job.budget or 0, job.rule.min_rank, job.rule.max_rank)
    return {module: RankRule(rank=rank) for module, rank in ranks.items()}


def _cut(
    job: Job, layers: Sequence[LayerInputs], merged: Sequence[Merged], rules: Mapping[str, RankRule], *, whole: bool
) -> list[tuple[Merged, dict[str, Any]]]:
    """The rank rule and the flattening on a window, with the report's rows."""
    chosen = [rules.get(layer.module) or _rule_of(job, layer) for layer in layers]
    out: dict[int, tuple[Merged, dict[str, Any]]] = {}
    rest: list[int] = []
    for index, (layer, update, rule) in enumerate(zip(layers, merged, chosen, strict=True)):
        plain = rule.is_lossless and job.post is None
        if plain and isinstance(update, Approximation) and update.account is not None:
            account = _with_spectra_here([update.account])[0]
            out[index] = LowRank(update.B, update.A), _cut_row(job, layer.module, account, clamp=True)
            _tell_exact(job, update)
        elif plain and (whole or isinstance(update, LowRank)):
            out[index] = update, _row(layer.module, update)
        else:
            rest.append(index)
    cut = _truncate(job, [layers[i] for i in rest], [merged[i] for i in rest], [chosen[i] for i in rest])
    for index, result in zip(rest, cut, strict=True):
        out[index] = _posted(job, layers[index], result, clamp=layers[index].module not in rules)
    return [out[index] for index in range(len(layers))]


def _truncate(
    job: Job, layers: Sequence[LayerInputs], merged: Sequence[Merged], rules: Sequence[RankRule]
) -> list[Truncated]:
    """Every result cut by its rule: factors through their cores in batches, others through a sketch of their rows."""
    found: dict[int, Truncated] = {}
    low = [index for index, update in enumerate(merged) if isinstance(update, LowRank)]
    pairs = [update for update in merged if isinstance(update, LowRank)]
    found.update(zip(low, truncate_many(pairs, [rules[i] for i in low]), strict=True))
    rest = [index for index in range(len(merged)) if index not in found]

    def sketch(index: int) -> Truncated:
        update, rule = merged[index], rules[index]
        # A dense result of adapters (it has no low rank of its own) is bounded like a stream of rows: R of the module.
        bound = getattr(update, "rank_bound", None) or _stacked_rank(layers[index]) or min(update.shape)
        rank = bound if rule.is_lossless and job.budget is None else rule.rank
        most = min(bound, rule.max_rank or bound)
        return low_rank(update, replace(rule, rank=rank, max_rank=max(most, rule.min_rank)), layers[index].module)

    found.update(zip(rest, pool_map(sketch, rest), strict=True))
    return _with_spectra_here([found[index] for index in range(len(merged))])


def _with_spectra_here(cuts: Sequence[Truncated]) -> list[Truncated]:
    """The same with spectra in the computer's own memory, where the report reads them; a GPU is waited for once."""
    there = [cut.spectrum for cut in cuts if cut.spectrum.device.type != "cpu"]
    if not there:
        return list(cuts)
    here = iter(torch.cat(there).cpu().split([len(S) for S in there]))
    return [cut if cut.spectrum.device.type == "cpu" else replace(cut, spectrum=next(here)) for cut in cuts]


def _stacked_rank(layer: LayerInputs) -> int:
    """R of a module: the ranks of the adapters whose delta is not 0."""
    pairs = [(w, f) for w, f in layer.present if isinstance(f, LowRank)]
    return sum(f.rank for w, f in pairs if w != 0.0 and bool(f.B.any()) and bool(f.A.any()))


def _posted(job: Job, layer: LayerInputs, result: Truncated, *, clamp: bool) -> tuple[LowRank, dict[str, Any]]:
    """A cut module, flattened where the method or the user asks for it, and its row of the report."""
    row = _cut_row(job, layer.module, result, clamp=clamp)
    if job.post is None:
        return result.factors, row
    asked = job.post.target_norm == "mean-adapter"
    mean = sum(abs(w) * norm(f) for w, f in layer.present) / layer.count if asked else None
    flat, numbers = flatten_update(result.factors, result.spectrum, job.post, adapter_norm=mean)
    return flat, row | {"rank": flat.rank, "post": numbers}


def _cut_row(job: Job, module: str, result: Truncated, *, clamp: bool) -> dict[str, Any]:
    """The report row of a module that a rank rule cut."""
    S, k = result.spectrum, result.rank
    # A sketch knows the leading values only; what it missed is in the error.
    total = (float(S[:k].square().sum()) + result.error**2) ** 0.5
    notes = job.clamped(module, k) if clamp else []
    if k < S.numel() and cut_gap(S, k) < GAP < float(S[k] / S[0]):
        notes.append(f"{module}: singular values {k} and {k + 1} are equal: which is cut is arbitrary")
    return {
        "module": module,
        "rank": result.factors.rank,
        "kept_energy": result.kept_energy,
        # What is left of a sum that cancels is rounding, not an error of the cut.
        "relative_error": result.error / total if result.error > 1e-12 * total else 0.0,
        "norm": total,
        "spectrum": S.tolist(),
        "notes": notes,
    }


def _tell_exact(job: Job, update: Approximation) -> None:
    """Says once that a randomized method took its exact form."""
    note = "the exact decomposition is cheaper than a sketch here and was used (exact=auto)"
    if update.exact and getattr(job.params, "exact", None) == "auto" and note not in job.warnings:
        job.warnings.append(note)


def _with_loss(row: dict[str, Any], lost: float) -> dict[str, Any]:
    """The row with what reading cut counted too: the errors add up at most."""
    if lost == 0.0 or row["norm"] == 0.0:
        return row
    relative = min(1.0, row["relative_error"] + lost / row["norm"])
    return row | {"relative_error": relative, "kept_energy": 1.0 - relative**2}


def _row(module: str, update: Merged) -> dict[str, Any]:
    """The report row of a module from which nothing was cut."""
    size = norm(update) if isinstance(update, LowRank) else _row_norm(update)
    rank = update.rank if isinstance(update, LowRank) else min(update.shape)
    return {
        "module": module, "rank": rank, "kept_energy": 1.0, "relative_error": 0.0, "norm": size, "spectrum": None,
        "notes": [],
    }  # fmt: skip


def _row_norm(update: Merged) -> float:
    """Frobenius norm of an update from blocks of its rows."""
    step = max(1, 2**20 // max(1, update.shape[1]))
    blocks = (update.rows(i, min(i + step, update.shape[0]), torch.float64) for i in range(0, update.shape[0], step))
    squares = torch.stack([block.square().sum() for block in blocks]).tolist()
    return math.fsum(squares) ** 0.5


def _rule_of(job: Job, layer: LayerInputs) -> RankRule:
    """The user's rank rule, or the method's default one."""
    if job.post is not None and job.rule.is_lossless:
        return RankRule(ratio=1.0 / NULL[_stored_dtype(job, layer.module)], min_rank=job.rule.min_rank)
    if not job.rule.is_lossless or job.row.default_rank == "full":
        return job.rule
    widest = max(f.rank for _, f in layer.present)
    return RankRule(rank=max(widest, job.rule.min_rank))


def _stored_dtype(job: Job, module: str) -> torch.dtype:
    """float64 where any adapter stores the module so, else float32: what decides what is rounding of the inputs."""
    stored = {a.info(module).dtype for a in job.adapters if module in a.modules_set}
    return torch.float64 if torch.float64 in stored else torch.float32


def _widened(layer: LayerInputs, stored: torch.dtype) -> LayerInputs:
    """The same module in float64, with the dtype kept whose rounding it carries."""
    return replace(layer, factors=[f and f.to(torch.float64) for f in layer.factors], rounding=stored)
