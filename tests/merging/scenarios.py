"""Adapters on disk and as the dense oracles see them: shapes, ranks, scalings and gaps of all kinds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import loraforge as lf
from tests.adapters import folders
from tests.oracles.factored import best_rank_k, relative, spectrum

Array = NDArray[np.float64]
DTYPES = {"float64": torch.float64, "float32": torch.float32}
TOLERANCE = {"float64": 1e-10, "float32": 2e-6}

SHAPES = {
    "block.0.wide": (64, 48),
    "block.0.tall": (48, 64),
    "block.1.long": (96, 40),
    "block.1.thin": (1, 17),
    "block.2.square": (40, 40),
}


@dataclass(frozen=True)
class Pair:
    """One module of one adapter as its file holds it: B (m, r), A (r, n) in float64, and the scaling of the config."""

    B: Array
    A: Array
    scaling: float

    @property
    def delta(self) -> Array:
        return self.scaling * self.B @ self.A


@dataclass(frozen=True)
class Scenario:
    """Folders, and what is in them: contents[i][module]."""

    paths: list[Path]
    contents: list[dict[str, Pair]]

    @property
    def count(self) -> int:
        return len(self.paths)

    def pairs(self, module: str) -> list[Pair | None]:
        return [content.get(module) for content in self.contents]

    @property
    def deltas(self) -> dict[str, list[Array | None]]:
        """module -> s_i B_i A_i of each adapter, None where it lacks the module; the oracles' input."""
        return {m: [None if p is None else p.delta for p in self.pairs(m)] for m in self.modules}

    @property
    def modules(self) -> list[str]:
        return [m for m in SHAPES if any(m in content for content in self.contents)]

    def ranks(self, module: str) -> list[int]:
        """r_i of each adapter, 0 where it lacks the module."""
        return [0 if p is None else p.A.shape[0] for p in self.pairs(module)]

    def bound(self, module: str) -> int:
        """The largest rank of the output, min(R, m, n)."""
        return min(sum(self.ranks(module)), *SHAPES[module])


@dataclass(frozen=True)
class Recipe:
    """One adapter to write: ranks and alphas by the last word of the module's name, rsLoRA as PEFT has it."""

    name: str
    ranks: dict[str, int]
    seed: int
    alpha: float = 8.0
    alphas: tuple[tuple[str, float], ...] = ()
    rslora: bool = False
    integers: bool = False


def write(folder: Path, recipe: Recipe, dtype: torch.dtype) -> tuple[Path, dict[str, Pair]]:
    """Writes an adapter with Gaussian factors whose columns fall off like i^(-1/2), all products of norm about 1.

    `integers`: factors of -1, 0 and 1 and scaling 1, so that entries of the delta are exact and many are equal.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    tensors, content, ranks = {}, {}, {}
    for module, (m, n) in SHAPES.items():
        short = module.rsplit(".", 1)[1]
        if short not in recipe.ranks:
            continue
        r = ranks[module] = recipe.ranks[short]
        alpha = dict(recipe.alphas).get(short, recipe.alpha)
        scaling = alpha / (math.sqrt(r) if recipe.rslora else r)
        fall = torch.arange(1, r + 1, dtype=torch.float64).rsqrt()
        size = 1.0 / math.sqrt(m * n * scaling * scaling)
        B = (torch.randn(m, r, generator=generator, dtype=torch.float64) * fall * size).to(dtype)
        A = torch.randn(r, n, generator=generator, dtype=torch.float64).to(dtype)
        if recipe.integers:
            B = torch.randint(-1, 2, (m, r), generator=generator).to(dtype)
            A = torch.randint(-1, 2, (r, n), generator=generator).to(dtype)
        tensors[f"{folders.PREFIX}{module}.lora_B.weight"] = B
        tensors[f"{folders.PREFIX}{module}.lora_A.weight"] = A
        content[module] = Pair(B.double().numpy(), A.double().numpy(), scaling)
    settings: dict[str, Any] = folders.config(
        r=4,
        lora_alpha=recipe.alpha,
        rank_pattern=ranks,
        alpha_pattern=dict(recipe.alphas),
        target_modules=sorted(recipe.ranks),
        use_rslora=recipe.rslora,
    )
    return folders.write_folder(folder / recipe.name, tensors, settings), content


FIRST = Recipe("first", {"wide": 4, "tall": 2, "long": 16, "thin": 3, "square": 5}, 1, alphas=(("wide", 12.0),))
SECOND = Recipe("second", {"wide": 2, "tall": 6, "long": 14, "thin": 1, "square": 1}, 2, alpha=3.0, rslora=True)
THIRD = Recipe("third", {"wide": 8, "long": 12, "square": 5}, 3, alpha=16.0)
BIG = Recipe("big", {"wide": 64, "tall": 30, "long": 33, "thin": 2, "square": 40}, 4, alpha=32.0)
BIGGER = Recipe("bigger", {"wide": 5, "tall": 25, "long": 10, "thin": 1, "square": 7}, 5, alpha=4.0, rslora=True)
LEFT = Recipe("left", {"wide": 3, "tall": 6, "long": 4, "thin": 1, "square": 8}, 6, alpha=2.0)
RIGHT = Recipe(
    "right", {"wide": 3, "tall": 6, "long": 4, "thin": 1, "square": 8}, 7, alpha=5.0, alphas=(("long", 1.0),)
)
WHOLE = {"wide": 50, "tall": 49, "long": 41, "thin": 2, "square": 40}
WHOLE_A = Recipe("whole_a", WHOLE, 8, alphas=tuple(WHOLE.items()), integers=True)
WHOLE_B = Recipe("whole_b", WHOLE, 9, alphas=tuple(WHOLE.items()), integers=True)

SCENARIOS = {
    "mixed": (FIRST, SECOND, THIRD),  # two modules are missing from the third; R > min(m, n) in one
    "full": (BIG, BIGGER),  # R >= min(m, n) everywhere
    "equal": (LEFT, RIGHT),  # equal ranks, different scalings
    "twice": (LEFT, LEFT, RIGHT),  # the same folder twice: dependent directions
    "integers": (WHOLE_A, WHOLE_B),  # equal magnitudes at every threshold, zero entries, sums of exactly 0
}


class Maker:
    """Writes each scenario once a dtype."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[tuple[str, str], Scenario] = {}

    def __call__(self, name: str, dtype: str) -> Scenario:
        if (name, dtype) not in self.made:
            recipes = {recipe.name: recipe for recipe in SCENARIOS[name]}
            written = {k: write(self.folder / f"{name}-{dtype}", r, DTYPES[dtype]) for k, r in recipes.items()}
            found = [written[recipe.name] for recipe in SCENARIOS[name]]
            self.made[name, dtype] = Scenario([path for path, _ in found], [content for _, content in found])
        return self.made[name, dtype]


def deltas_of(result: lf.MergeResult) -> dict[str, Array]:
    """The merged deltas in float64."""
    return {name: pair.delta(torch.float64).numpy() for name, pair in result.modules.items()}


def merged(paths: Sequence[Path], method: str, **options: Any) -> dict[str, Array]:
    """The deltas of a merge through the public API."""
    return deltas_of(lf.merge(paths, method, **options))


def distances(found: Mapping[str, Array], want: Mapping[str, Array]) -> dict[str, float]:
    """Relative Frobenius distance by module; the norm of what is found where nothing is wanted."""
    assert set(found) == set(want)
    return {m: relative(found[m], W) if np.any(W) else float(np.linalg.norm(found[m])) for m, W in want.items()}


def excess(found: Mapping[str, Array], want: Mapping[str, Array], s: Scenario) -> dict[str, float]:
    """Distance by module of a rank-R result from the best rank-R approximation of what is wanted.

    That approximation is determined up to rounding times S_1 / (S_R - S_(R+1)), by which the distance is divided; its
    error is determined without that factor and is compared too. Where R >= min(m, n) nothing may be lost.
    """
    assert set(found) == set(want)
    out = {}
    for m, W in want.items():
        R = s.bound(m)
        if min(W.shape) == R or not np.any(W):
            out[m] = relative(found[m], W) if np.any(W) else float(np.linalg.norm(found[m]))
            continue
        best, error = best_rank_k(W, R)
        S = spectrum(W)
        lost = abs(np.linalg.norm(found[m] - W) ** 2 - error**2) / np.linalg.norm(W) ** 2
        out[m] = max(float(lost), relative(found[m], best) * (S[R - 1] - S[R]) / S[0])
    return out


def kept_energy(found: Array, want: Array) -> float:
    """Share of the squared norm that a projection of `want` keeps."""
    return 1.0 - float(np.linalg.norm(found - want) ** 2 / np.linalg.norm(want) ** 2) if np.any(want) else 1.0
