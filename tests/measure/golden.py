"""A run of 3 layers with 4 heads in the document's files, written by hand, and runs of drawn numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

HEADS = [(layer, head) for layer in range(3) for head in range(4)]
# Layer by layer; I_pre has ties, Urel too.
I_PRE = [0.10, -0.02, 0.30, 0.05, 0.30, 0.00, 0.07, -0.01, 0.50, 0.05, 0.02, 0.40]
I_POST = [0.20, -0.05, 0.10, 0.15, 0.60, 0.01, 0.00, 0.02, 0.30, 0.25, -0.04, 0.35]
UREL = [0.04, 0.09, 0.01, 0.06, 0.05, 0.10, 0.02, 0.08, 0.01, 0.07, 0.03, 0.05]
U = [0.4, 0.8, 0.2, 0.6, 0.5, 1.0, 0.3, 0.9, 0.1, 0.7, 0.3, 0.5]
G = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.10, 0.11, 0.12]


def document_lines() -> dict[str, list[dict[str, Any]]]:
    """The files as the document's programs write them."""
    places = [{"layer": layer, "head": head} for layer, head in HEADS]
    base = {"loss_base": 0.6931, "n": 277}
    return {
        "importance_pre.jsonl": [
            p | {"I": i, "loss_base": 0.6931, "loss_ablate": 0.6931 + i, "n": 277}
            for p, i in zip(places, I_PRE, strict=True)
        ],
        "importance_post.jsonl": [
            p | {"I": i, "loss_ablate": 0.6931 + i} | base for p, i in zip(places, I_POST, strict=True)
        ],
        "gradfisher_pre.jsonl": [
            p | {"G": g, "F": g * g * 2, "Ppred": 0.5, "n_batches": 18} for p, g in zip(places, G, strict=True)
        ],
        "update.jsonl": [
            p | {"U": u, "Urel": r, "Uq": u * 0.5, "Uk": u * 0.5, "Uv": u * 0.5, "Uo": u * 0.5}
            for p, u, r in zip(places, U, UREL, strict=True)
        ],
    }


def write_run(folder: Path, files: Mapping[str, list[dict[str, Any]]] | None = None, **config: Any) -> Path:
    """A run's folder; with `config` a run_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (document_lines() if files is None else files).items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if config:
        (folder / "run_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "eval_subset.json").write_text("[4, 1, 3]", encoding="utf-8")
    return folder


def drawn_run(
    folder: Path, draw: int, /, *, layers: int = 6, heads: int = 6, start: int = 99, moves: float = 0.0, **config: Any
) -> Path:
    """A run of drawn numbers: I_pre depends on `start` alone, U and Urel on I_pre as far as `moves` says."""
    first = np.random.default_rng(start).normal(size=(layers, heads))
    random = np.random.default_rng(draw)
    places = [(layer, head) for layer in range(layers) for head in range(heads)]

    def lines(values: Callable[[int, int], dict[str, float]]) -> list[dict[str, Any]]:
        return [{"layer": layer, "head": head, **values(layer, head)} for layer, head in places]

    def update(layer: int, head: int) -> dict[str, float]:
        names = ("U", "Urel", "Uq", "Uk", "Uv", "Uo")
        return dict(zip(names, (random.random(6) + moves * first[layer, head]).tolist(), strict=True))

    def after(layer: int, head: int) -> dict[str, float]:
        value = float(first[layer, head] + random.normal())
        return {"I": value, "ci_lo": value - 0.1, "ci_hi": value + 0.1}

    files = {
        "importance_pre.jsonl": lines(lambda layer, head: {"I": float(first[layer, head])}),
        "importance_post.jsonl": lines(after),
        "gradfisher_pre.jsonl": lines(
            lambda *_: dict(zip("GF", random.random(2).tolist(), strict=True)) | {"Ppred": 0.5}
        ),
        "update.jsonl": lines(update),
    }
    return write_run(folder, files, **config)
