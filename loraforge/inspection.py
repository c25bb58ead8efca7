"""What is in adapters and how much they agree: ranks, norms, spectra, conflicts. From factors, never whole deltas."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from loraforge.adapters import Adapter, all_modules, open_adapter, unique_names, with_common_names
from loraforge.checkpoints import looks_like_checkpoint
from loraforge.errors import LoraforgeError
from loraforge.linalg.agreement import ENTRIES, Agreement, agreement
from loraforge.linalg.device import ON_CPU, choose_device, named_when_full
from loraforge.linalg.rank import energy_rank
from loraforge.linalg.spectrum import effective_rank, stable_rank
from loraforge.types import LowRank

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
# Ratios of sums over modules, by the name of the result: (numerator, denominator).
_SHARES = {
    "sign_conflict": ("differing", "compared"),
    "overlap_out": ("overlap_out", "dims_out"),
    "overlap_in": ("overlap_in", "dims_in"),
}
_RANKS = ("effective_rank", "stable_rank", "rank_90", "rank_99")


def inspect(paths: Paths, *, sign_entries: int = ENTRIES, device: str = "auto") -> dict[str, Any]:
    """Describes adapters and compares their deltas.

    Args:
        paths: One adapter or several. They need not belong to one base: modules of one name and shape are compared.
        sign_entries: Entries of a module whose signs are compared, about; all where it has no more.
        device: auto, cpu, cuda or cuda:i.

    Returns:
        JSON-ready. `adapters`: one entry each with format, notes, kinds, sizes and its `modules` (shape, kind, rank,
        scaling, norm, spectrum, effective and stable rank, rank for 90 and 99 % of the energy; the means of the last
        four in the entry). `coverage`: modules of any adapter, of all, by kind, and those that each lacks.
        (N, N) matrices over all shared modules: `cosine` of the deltas; `sign_conflict`, the share of entries with
        opposite signs; `overlap_out` and `overlap_in`, the mean squared cosine of the principal angles between the
        column and the row spaces. `cosine_modules` and `conflict_modules`: the same by module. Null where nothing is
        shared or a delta is zero.

    Raises:
        UsageError: An unknown device.
        LoraforgeError: A path is no readable adapter; a full checkpoint.
    """
    listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not listed:
        raise LoraforgeError("No adapter was given", expected="one or more adapters")
    for path in listed:
        _refuse_checkpoint(Path(path))
    place = choose_device(device)
    adapters = with_common_names([open_adapter(path) for path in listed])
    names = unique_names(adapters)
    entries = [_describe(adapter, name) for adapter, name in zip(adapters, names, strict=True)]
    total: dict[str, Tensor] = {}
    cosines: dict[str, Any] = {}
    conflicts: dict[str, Any] = {}
    for module in all_modules(adapters):
        pairs = [adapter.load(module) if module in adapter.modules_set else None for adapter in adapters]
        with named_when_full(place, "comparing adapters", module, ON_CPU):
            found = agreement([None if pair is None else pair.to(device=place) for pair in pairs], sign_entries)
        for entry, adapter, pair, spectrum in zip(entries, adapters, pairs, found.spectra, strict=True):
            if pair is not None and spectrum is not None:
                entry["modules"].append(_module(module, adapter, pair, spectrum))
        sums = _sums(found)
        total = {key: value + total.get(key, 0.0) for key, value in sums.items()}
        if len(adapters) > 1:
            cosines[module] = _cosines(sums)
            conflicts[module] = {key: _ratio(sums[one], sums[other]) for key, (one, other) in _SHARES.items()}
    for entry in entries:
        entry["norm"] = math.sqrt(math.fsum(module["norm"] ** 2 for module in entry["modules"]))
        entry |= {key: _mean([module[key] for module in entry["modules"]]) for key in _RANKS}
    return {
        "adapters": entries,
        "device": str(place),
        "coverage": _coverage(adapters, names),
        "cosine": _cosines(total),
        **{key: _ratio(total[one], total[other]) for key, (one, other) in _SHARES.items()},
        "cosine_modules": cosines,
        "conflict_modules": conflicts,
    }


def _refuse_checkpoint(path: Path) -> None:
    """Refuses a full model, whose deltas exist against a base only."""
    bare = (path / "config.json").is_file() and not (path / "adapter_config.json").is_file()
    # A model's configuration beside a single file of factors is a folder of somebody's adapter.
    if looks_like_checkpoint(path) or (bare and not any(path.glob("*.safetensors"))):
        raise LoraforgeError(
            "This is a full model, not an adapter",
            where=path,
            expected="adapters",
            hint="full models can be merged: loraforge merge MODEL MODEL --base BASE --method NAME --out DIR",
        )


def _describe(adapter: Adapter, name: str) -> dict[str, Any]:
    infos = [adapter.info(module) for module in adapter.modules]
    notes = list(adapter.notes)
    if adapter.has_dora:
        notes.append("DoRA: numbers are of B A alone, without the magnitudes")
    return {
        "name": name,
        "path": os.fspath(adapter.path),
        "format": adapter.format,
        "base": adapter.base,
        "task_type": adapter.task_type,
        "sha256": adapter.sha256,
        "bytes": adapter.bytes,
        "parameters": sum(info.rank * (info.m + info.n) for info in infos),
        "kinds": dict(sorted(Counter(info.kind for info in infos).items())),
        "notes": notes,
        "norm": 0.0,
        "heads": list(adapter.heads),
        "extras": list(adapter.extras),
        "modules": [],
    }


def _module(name: str, adapter: Adapter, pair: LowRank, spectrum: Tensor) -> dict[str, Any]:
    return {
        "module": name,
        "shape": list(pair.shape),
        "kind": adapter.info(name).kind,
        "rank": pair.rank,
        "scaling": pair.scaling,
        "dtype": str(adapter.info(name).dtype).removeprefix("torch."),
        "norm": float(spectrum.norm()),
        "spectrum": spectrum.tolist(),
        "effective_rank": effective_rank(spectrum),
        "stable_rank": stable_rank(spectrum),
        "rank_90": energy_rank(spectrum, 0.9),
        "rank_99": energy_rank(spectrum, 0.99),
    }


def _coverage(adapters: Sequence[Adapter], names: Sequence[str]) -> dict[str, Any]:
    """Modules of any adapter against those of each."""
    union = all_modules(adapters)
    kinds = {module: adapter.info(module).kind for adapter in reversed(adapters) for module in adapter.modules}
    return {
        "modules": len(union),
        "shared_by_all": sum(all(module in a.modules_set for a in adapters) for module in union),
        "kinds": dict(sorted(Counter(kinds.values()).items())),
        "missing": {
            name: [module for module in union if module not in adapter.modules_set]
            for name, adapter in zip(names, adapters, strict=True)
        },
    }


def _sums(found: Agreement) -> dict[str, Tensor]:
    """What adds up over modules: pairs that share the module, and for the cosine the norms of both there."""
    norms = found.inner.diagonal()
    return {
        "inner": found.inner,
        "own": found.shared * norms[:, None],
        "other": found.shared * norms[None, :],
        **{key: getattr(found, key) for pair in _SHARES.values() for key in pair},
    }


def _cosines(sums: Mapping[str, Tensor]) -> list[list[float | None]]:
    """Cosines over the modules that both have; rounding may put one of parallel deltas a hair outside of [-1, 1]."""
    found = _ratio(sums["inner"], (sums["own"] * sums["other"]).clamp_min(0.0).sqrt())
    return [[None if c is None else max(-1.0, min(1.0, c)) for c in row] for row in found]


def _ratio(one: Tensor, other: Tensor) -> list[list[float | None]]:
    """Entry by entry, None where nothing was compared."""
    rows = zip(one.tolist(), other.tolist(), strict=True)
    return [[a / b if b > 0.0 else None for a, b in zip(x, y, strict=True)] for x, y in rows]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
