"""CPU time of an exact rank-k merge: factored form against PEFT `cat`, PEFT `svd` and dense PyTorch.

28 layers of q 2048x1024, k/v 1024x1024, o 1024x2048, gate/up 3072x1024, down 1024x3072, two adapters, float32,
weights .5/.5, k = r, factor columns decaying as i^-1/2. One thread, process CPU time, all methods in one run and in
turn, medians. The dense forms take seconds a layer, so they run on a few layers and are scaled; the JSON says which.
PEFT `cat` cuts nothing (its result has rank 2r); it stands for the least that a merge through a model costs.

    OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 python -m benchmarks.merge_factored
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from loraforge.bench.machine import describe
from loraforge.linalg.factored import stack, truncate_many
from loraforge.linalg.rank import RankRule
from loraforge.types import LowRank

SHAPES = {
    "q_proj": (2048, 1024),
    "k_proj": (1024, 1024),
    "v_proj": (1024, 1024),
    "o_proj": (1024, 2048),
    "gate_proj": (3072, 1024),
    "up_proj": (3072, 1024),
    "down_proj": (1024, 3072),
}
LAYERS = 28
WEIGHTS = (0.5, 0.5)
RESULT = Path(__file__).parent / "results" / "merge-factored.json"


class Layer(nn.Module):
    """The linear layers of one block; weights are shared between blocks, since no method here reads them."""

    def __init__(self, weights: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, weight in weights.items():
            linear = nn.Linear(1, 1, bias=False)
            linear.weight, linear.in_features, linear.out_features = weight, weight.shape[1], weight.shape[0]
            setattr(self, name, linear)


class Model(nn.Module):
    """Blocks in a list, as a causal language model has them."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        weights = {name: nn.Parameter(torch.zeros(m, n), requires_grad=False) for name, (m, n) in SHAPES.items()}
        self.layers = nn.ModuleList(Layer(weights) for _ in range(layers))


def make_adapters(layers: int, rank: int, seed: int) -> list[dict[str, LowRank]]:
    """Two adapters, module -> factors with columns decaying as i^-1/2."""
    generator = torch.Generator().manual_seed(seed)
    decay = torch.arange(1, rank + 1, dtype=torch.float32).rsqrt()
    return [
        {
            f"layers.{i}.{name}": LowRank(
                torch.randn(m, rank, generator=generator) * decay, torch.randn(rank, n, generator=generator) / 32, 1.0
            )
            for i in range(layers)
            for name, (m, n) in SHAPES.items()
        }
        for _ in WEIGHTS
    ]


def make_peft(adapters: list[dict[str, LowRank]], layers: int, rank: int) -> Any:
    """A PeftModel of `layers` blocks with the same factors as adapters "a0", "a1"."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(SHAPES))
    model = get_peft_model(Model(layers), config, adapter_name="a0")
    model.add_adapter("a1", config)
    modules = dict(model.base_model.model.named_modules())
    with torch.no_grad():
        for index, adapter in enumerate(adapters):
            for name, pair in adapter.items():
                if int(name.split(".")[1]) < layers:
                    modules[name].lora_A[f"a{index}"].weight.copy_(pair.A)
                    modules[name].lora_B[f"a{index}"].weight.copy_(pair.B)
    return model


def factored(adapters: list[dict[str, LowRank]], rank: int, backend: str) -> None:
    """Ours: stack and best rank-k approximation of every module."""
    sums = [
        stack(list(zip(WEIGHTS, pairs, strict=True))) for pairs in zip(*(a.values() for a in adapters), strict=True)
    ]
    truncate_many(sums, RankRule(rank=rank), backend)  # type: ignore[arg-type]


def textbook(adapters: list[dict[str, LowRank]], rank: int) -> None:
    """The same in the shortest float32 form: QR of both sides and the SVD of the core, module by module."""
    for pairs in zip(*(a.values() for a in adapters), strict=True):
        L = torch.cat([w * pair.B for w, pair in zip(WEIGHTS, pairs, strict=True)], dim=1)
        Q_l, R_l = torch.linalg.qr(L)
        Q_a, R_a = torch.linalg.qr(torch.cat([pair.A for pair in pairs]).T)
        U, S, Vh = torch.linalg.svd(R_l @ R_a.T)
        root = S[:rank].sqrt()
        (Q_l @ (U[:, :rank] * root), (root[:, None] * Vh[:rank]) @ Q_a.T)


def dense(adapters: list[dict[str, LowRank]], rank: int, layers: int) -> None:
    """The sum formed densely and decomposed by torch.linalg.svd (thin), layer by layer."""
    for name, first in adapters[0].items():
        if int(name.split(".")[1]) < layers:
            delta = WEIGHTS[0] * first.delta() + WEIGHTS[1] * adapters[1][name].delta()
            U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
            root = S[:rank].sqrt()
            (U[:, :rank] * root, root[:, None] * Vh[:rank])


def peft_merge(model: Any, kind: str) -> None:
    """PEFT's own merge, into an adapter named "merged"."""
    options = {"svd_rank": model.peft_config["a0"].r} if kind == "svd" else {}
    model.add_weighted_adapter(["a0", "a1"], list(WEIGHTS), "merged", combination_type=kind, **options)


def cpu_seconds(job: Callable[[], None], after: Callable[[], None] = lambda: None) -> float:
    """Process CPU time of one call; `after` is not counted."""
    start = time.process_time()
    job()
    spent = time.process_time() - start
    after()
    return spent


def measure(rank: int, repeats: int, dense_layers: int, dense_repeats: int) -> dict[str, Any]:
    """Median CPU seconds of all 28 layers by method, taken in turn."""
    adapters = make_adapters(LAYERS, rank, seed=rank)
    whole, few = make_peft(adapters, LAYERS, rank), make_peft(adapters, dense_layers, rank)
    quick: dict[str, Callable[[], float]] = {
        "loraforge auto": lambda: cpu_seconds(lambda: factored(adapters, rank, "auto")),
        "loraforge qr": lambda: cpu_seconds(lambda: factored(adapters, rank, "qr")),
        "textbook float32": lambda: cpu_seconds(lambda: textbook(adapters, rank)),
        "peft cat": lambda: cpu_seconds(lambda: peft_merge(whole, "cat"), lambda: whole.delete_adapter("merged")),
    }
    slow: dict[str, Callable[[], float]] = {
        "peft svd": lambda: cpu_seconds(lambda: peft_merge(few, "svd"), lambda: few.delete_adapter("merged")),
        "torch dense svd": lambda: cpu_seconds(lambda: dense(adapters, rank, dense_layers)),
    }
    for job in quick.values():
        job()  # the first call loads libraries
    times: dict[str, list[float]] = {name: [] for name in (*quick, *slow)}
    for _ in range(repeats):
        for name, job in quick.items():
            times[name].append(job())
    for _ in range(dense_repeats):
        for name, job in slow.items():
            times[name].append(job() * LAYERS / dense_layers)
    ours = statistics.median(times["loraforge auto"])
    return {
        name: {
            "cpu_seconds_28_layers": statistics.median(values),
            "ms_per_layer": statistics.median(values) / LAYERS * 1e3,
            "times_ours": statistics.median(values) / ours,
            "runs": len(values),
            "layers_measured": LAYERS if name in quick else dense_layers,
            "exact_rank_k": name != "peft cat",
        }
        for name, values in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dense-layers", type=int, default=1)
    parser.add_argument("--dense-repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # PEFT warns once for each adapter that is added beside another
    results = {f"r={rank}": measure(rank, args.repeats, args.dense_layers, args.dense_repeats) for rank in args.ranks}
    report = {
        "what": "median process CPU time, one thread; dense forms run on `layers_measured` layers, scaled to 28",
        "machine": {**describe(), "peft": version("peft")},
        "results": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for label, rows in results.items():
        for name, row in rows.items():
            print(f"{label:5} {name:16} {row['ms_per_layer']:9.2f} ms/layer  {row['times_ours']:7.2f} x ours")


if __name__ == "__main__":
    main()
