"""At which strength the rSVD document compares its merges, against ours on the same pair of adapters.

The document's experiment in shape: two rank-32 PEFT adapters (lora_alpha 16, so scale 1/2) on q_proj 2048 x 1024 and
v_proj 1024 x 1024, random, columns of B falling off as i^-0.8 as in trained adapters. Its merges are redone here from
its formulas and its published code: PEFT files carry no `.alpha`, for which rSVD takes r and all others 1; the results
are loaded as its evaluation does, with scale 16 / k whatever the merge. Ours are written and read back.

For each: coefficient <M, T> / <T, T> on the true mean T of the two trained updates, cosine, relative error
||M - T|| / ||T||, over all modules. A fair comparison of methods has coefficients near 1.

    python -m benchmarks.document_strengths [--layers 2] [--out benchmarks/results/document-strengths.json]
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import loraforge as lf
from loraforge.bench.machine import describe

SHAPES = {"q_proj": (2048, 1024), "v_proj": (1024, 1024)}
RANK, ALPHA, EPS = 32, 16, 1e-12
RESULT = Path(__file__).parent / "results" / "document-strengths.json"
Factors = tuple[Tensor, Tensor]
Merge = Callable[[Factors, Factors], tuple[Tensor, int]]


def make_pair(layers: int, seed: int) -> list[dict[str, Factors]]:
    """Two adapters, module -> (B (m, 32), A (32, n))."""
    g = torch.Generator().manual_seed(seed)
    decay = torch.arange(1, RANK + 1, dtype=torch.float32) ** -0.8
    return [
        {
            f"model.layers.{i}.self_attn.{name}": (
                torch.randn(m, RANK, generator=g) * decay / m**0.5, torch.randn(RANK, n, generator=g) / n**0.5
            )
            for i in range(layers)
            for name, (m, n) in SHAPES.items()
        }
        for _ in range(2)
    ]  # fmt: skip


def dense_svd(total: Tensor) -> tuple[Tensor, int]:
    """The document's SVD merge of a dense sum: top min(r_1, r_2), thin SVD."""
    U, S, Vh = torch.linalg.svd(total, full_matrices=False)
    return (U[:, :RANK] * S[:RANK]) @ Vh[:RANK], RANK


def concatenate(one: Factors, two: Factors) -> tuple[Tensor, int]:
    return one[0] @ one[1] + two[0] @ two[1], 2 * RANK


def geometric(one: Factors, two: Factors) -> tuple[Tensor, int]:
    """The published code: the sign of the second A is lost."""
    up, down = one[0] * two[0], one[1] * two[1]
    return (up.sign() * (up.abs() + 1e-8).sqrt()) @ (one[1].sign() * (down.abs() + 1e-8).sqrt()), RANK


def svd(one: Factors, two: Factors) -> tuple[Tensor, int]:
    return dense_svd((one[0] @ one[1] + two[0] @ two[1]) / RANK)  # alpha = 1 where the file has none


def weighted(one: Factors, two: Factors) -> tuple[Tensor, int]:
    return dense_svd((0.5 * one[0] @ one[1] + 0.5 * two[0] @ two[1]) / RANK)


def rsvd(min_rank: int, max_rank: int, threshold: float) -> Merge:
    """The published rSVD: alpha = r where the file has none, no oversampling, a share of sum S over q values."""

    def merge(one: Factors, two: Factors) -> tuple[Tensor, int]:
        parts = [one[0] @ one[1], two[0] @ two[1]]
        n1, n2 = (float(part.norm()) + EPS for part in parts)
        w = 0.5 if min(n1, n2) / max(n1, n2) < 0.5 else n1 / (n1 + n2)
        q = min(max(min_rank, int(RANK * threshold)), *parts[0].shape, max_rank)
        U, S, V = torch.svd_lowrank(w * parts[0] + (1 - w) * parts[1], q=q, niter=2)
        k = int(torch.searchsorted(S.cumsum(0) / (S.sum() + EPS), threshold)) + 1
        k = min(max_rank, max(min_rank, k), q)
        return (U[:, :k] * S[:k]) @ V[:, :k].T, k

    return merge


DOCUMENT: dict[str, Merge] = {
    "M_Concatenate": concatenate,
    "M_Geometric_mean": geometric,
    "M_SVD": svd,
    "M_Weighted_avg": weighted,
    "M_rSVD_strategy1": rsvd(4, 32, 0.99),
    "M_rSVD_strategy2": rsvd(32, 32, 1.0),
    "M_rSVD_strategy3": rsvd(64, 64, 1.0),
}
OURS: dict[str, dict[str, Any]] = {
    "concat": {"method": "concat", "weights": [0.5, 0.5]},
    "weighted-average": {"method": "weighted-average"},
    "geometric-mean": {"method": "geometric-mean"},
    "geometric-mean, aligned": {"method": "geometric-mean", "params": {"align": True}},
    "svd, rank 32": {"method": "svd", "weights": [0.5, 0.5]},
    "weighted-average, rank 32": {"method": "weighted-average", "rank": 32},
    "rsvd": {"method": "rsvd"},
    "rsvd, rank 32": {"method": "rsvd", "rank": 32},
    "rsvd, sketched, rank 32": {"method": "rsvd", "rank": 32, "params": {"exact": "never"}},
    "rsvd, rank 64": {"method": "rsvd", "rank": 64},
}


class Against:
    """Sums over modules for coefficient, cosine and relative error."""

    def __init__(self) -> None:
        self.dot = self.found = self.true = self.away = 0.0
        self.ranks: list[int] = []

    def add(self, found: Tensor, true: Tensor, rank: int) -> None:
        found, true = found.double(), true.double()
        self.dot += float((found * true).sum())
        self.found += float(found.square().sum())
        self.true += float(true.square().sum())
        self.away += float((found - true).square().sum())
        self.ranks.append(rank)

    def row(self) -> dict[str, float]:
        return {
            "coefficient": self.dot / self.true,
            "cosine": self.dot / math.sqrt(self.found * self.true),
            "relative_error": math.sqrt(self.away / self.true),
            "mean_rank": sum(self.ranks) / len(self.ranks),
        }


def mean_of(pair: list[dict[str, Factors]], module: str) -> Tensor:
    """The true mean of the two trained updates, scale alpha / r."""
    return sum(ALPHA / RANK * B @ A for B, A in (adapter[module] for adapter in pair)) / 2  # type: ignore[return-value]


def measure_document(pair: list[dict[str, Factors]]) -> dict[str, dict[str, float]]:
    """The document's merges, loaded with scale 16 / k."""
    torch.manual_seed(0)  # the document sets no seed; this only fixes the figures
    rows = {}
    for name, merge in DOCUMENT.items():
        against = Against()
        for module, one in pair[0].items():
            found, k = merge(one, pair[1][module])
            against.add(ALPHA / k * found, mean_of(pair, module), k)
        rows[name] = against.row()
    return rows


def measure_ours(pair: list[dict[str, Factors]], folder: Path) -> dict[str, dict[str, float]]:
    """Our merges, written as PEFT folders and read back with the scale that the configuration states."""
    paths = []
    for index, adapter in enumerate(pair):
        paths.append(folder / f"adapter{index}")
        paths[-1].mkdir()
        tensors = {}
        for module, (B, A) in adapter.items():
            tensors[f"base_model.model.{module}.lora_B.weight"] = B
            tensors[f"base_model.model.{module}.lora_A.weight"] = A
        save_file(tensors, paths[-1] / "adapter_model.safetensors", {"format": "pt"})
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(SHAPES), "bias": "none"}
        (paths[-1] / "adapter_config.json").write_text(json.dumps(config))
    rows = {}
    for index, (name, options) in enumerate(OURS.items()):
        written = lf.open_adapter(lf.merge(paths, **options).save(folder / f"out{index}"))
        against = Against()
        for module in written.modules:
            pair_out = written.load(module)
            against.add(pair_out.delta(), mean_of(pair, module), pair_out.rank)
        rows[name] = against.row()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    pair = make_pair(args.layers, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        results = {"document": measure_document(pair), "loraforge": measure_ours(pair, Path(folder))}
    report = {
        "what": "merged update M, as its consumer loads it, against the true mean T of the two trained updates: "
        "coefficient <M,T>/<T,T>, cosine, relative error ||M-T||/||T||",
        "machine": describe(),
        "layers": args.layers,
        "seed": args.seed,
        "results": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for side, rows in results.items():
        for name, row in rows.items():
            numbers = f"{row['coefficient']:+.3f}  {row['cosine']:+.3f}  {row['relative_error']:.3f}"
            print(f"{side:10} {name:26} {numbers}  rank {row['mean_rank']:g}")


if __name__ == "__main__":
    main()
