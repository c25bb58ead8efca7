"""What is in adapters and how much they agree: ranks, scales, norms, spectra, cosines. From factors, never densely."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from loraforge.adapters import Adapter, all_modules, open_adapter, unique_names
from loraforge.errors import LoraforgeError
from loraforge.linalg.factored import inner
from loraforge.linalg.spectrum import effective_rank, singular_values, stable_rank
from loraforge.types import LowRank

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def inspect(paths: Paths) -> dict[str, Any]:
    """Describes adapters and compares their deltas.

    Args:
        paths: One PEFT folder or several. They need not belong to one base: modules of one name and shape are compared.

    Returns:
        JSON-ready: `adapters`, one entry each with its `modules` (shape, rank, scaling, norm, spectrum, effective and
        stable rank), `heads` and `extras`; `cosine`, the matrix over all shared modules; `cosine_modules`, the same by
        module. A cosine is null where nothing is shared or a delta is zero.

    Raises:
        LoraforgeError: A path is no readable PEFT adapter.
    """
    listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not listed:
        raise LoraforgeError("No adapter was given", expected="one or more PEFT folders")
    adapters = [open_adapter(path) for path in listed]
    entries = [_describe(adapter, name) for adapter, name in zip(adapters, unique_names(adapters), strict=True)]
    count = len(adapters)
    # One Gram matrix of inner products a module; pairs that do not share the module stay None.
    grams: dict[str, list[list[float | None]]] = {}
    for module in all_modules(adapters):
        pairs = [adapter.load(module) if module in adapter.modules_set else None for adapter in adapters]
        grams[module] = _gram(pairs)
        for entry, pair in zip(entries, pairs, strict=True):
            if pair is not None:
                entry["modules"].append(_module(module, pair))
    for entry in entries:
        entry["norm"] = math.sqrt(math.fsum(module["norm"] ** 2 for module in entry["modules"]))
    total = [[_cosine(list(grams.values()), i, j) for j in range(count)] for i in range(count)]
    by_module = {
        module: [[_cosine([gram], i, j) for j in range(count)] for i in range(count)] for module, gram in grams.items()
    }
    return {"adapters": entries, "cosine": total, "cosine_modules": by_module if count > 1 else {}}


def _describe(adapter: Adapter, name: str) -> dict[str, Any]:
    infos = [adapter.info(module) for module in adapter.modules]
    return {
        "name": name,
        "path": os.fspath(adapter.path),
        "format": "peft",
        "base": adapter.base,
        "task_type": adapter.task_type,
        "sha256": adapter.sha256,
        "bytes": adapter.bytes,
        "parameters": sum(info.rank * (info.m + info.n) for info in infos),
        "norm": 0.0,
        "heads": list(adapter.heads),
        "extras": list(adapter.extras),
        "modules": [],
    }


def _module(name: str, pair: LowRank) -> dict[str, Any]:
    spectrum = singular_values(pair)
    return {
        "module": name,
        "shape": list(pair.shape),
        "rank": pair.rank,
        "scaling": pair.scaling,
        "dtype": str(pair.A.dtype).removeprefix("torch."),
        "norm": float(spectrum.norm()),
        "spectrum": spectrum.tolist(),
        "effective_rank": effective_rank(spectrum),
        "stable_rank": stable_rank(spectrum),
    }


def _gram(pairs: Sequence[LowRank | None]) -> list[list[float | None]]:
    """Inner products of the deltas of one module, None where one of two is missing or of another shape."""
    gram: list[list[float | None]] = [[None] * len(pairs) for _ in pairs]
    for i, pair in enumerate(pairs):
        if pair is not None:
            gram[i][i] = inner(pair, pair)
    for (i, a), (j, b) in combinations(enumerate(pairs), 2):
        if a is not None and b is not None and a.shape == b.shape:
            gram[i][j] = gram[j][i] = inner(a, b)
    return gram


def _cosine(grams: Sequence[Sequence[Sequence[float | None]]], i: int, j: int) -> float | None:
    """Cosine of adapters i and j over the modules that both have."""
    dot = one = other = 0.0
    for gram in grams:
        product, a, b = gram[i][j], gram[i][i], gram[j][j]
        if product is not None and a is not None and b is not None:
            dot, one, other = dot + product, one + a, other + b
    if one <= 0.0 or other <= 0.0:
        return None
    # Rounding may put a cosine of parallel deltas a hair outside of [-1, 1].
    return max(-1.0, min(1.0, dot / math.sqrt(one * other)))
