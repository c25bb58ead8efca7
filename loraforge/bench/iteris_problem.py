"""The problem of the groups `iteris` and `scale`, and the ways to solve it: each one job of a process of its own.

A BERT-shaped model with random weights, N adapters on all its linear modules, and random tokens for each task.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from loraforge.adapters import PeftMeta, write_adapter
from loraforge.bench.memory import peak_above
from loraforge.bench.peers.document_loop import document_loop
from loraforge.bench.peers.objective import iteris_objective
from loraforge.linalg.device import choose_device
from loraforge.merging.runner import merge
from loraforge.types import LowRank

ALPHA = 1e-7
VOCABULARY = 1000
TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
# Our defaults solve for the full weights; these are the settings of the loop's own problem.
SAME_PROBLEM: dict[str, Any] = {
    "alpha_1": ALPHA, "alpha_2": ALPHA, "reg_ceof": 0.0, "lambda_weight": "full", "with_pretrain_matrix": 0,
    "use_camr": False, "use_dcs": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Problem:
    """Sizes; `solves` is the number of rounds of the document's loop."""

    layers: int
    width: int
    rank: int
    tasks: int
    samples: int
    tokens: int
    solves: int

    @property
    def heads(self) -> int:
        """Heads of 32 features, at least one."""
        return max(1, self.width // 32)


@dataclass(frozen=True, eq=False)
class Built:
    """Model, deltas {module: (B, A, s)} by task, and token ids (samples, tokens) by task."""

    model: nn.Module
    adapters: list[dict[str, tuple[Tensor, Tensor, float]]]
    ids: list[Tensor]

    def batches(self) -> list[list[dict[str, Tensor]]]:
        """Batches of 16 samples, as the loop takes them."""
        return [[_inputs(part) for part in task.split(16)] for task in self.ids]


def _inputs(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def build(problem: Problem, device: torch.device) -> Built:
    """The same numbers at every call, drawn on the CPU."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=problem.width, num_hidden_layers=problem.layers,
        num_attention_heads=problem.heads, intermediate_size=4 * problem.width, max_position_embeddings=problem.tokens,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval().to(device)
    g = torch.Generator().manual_seed(1)
    adapters: list[dict[str, tuple[Tensor, Tensor, float]]] = [{} for _ in range(problem.tasks)]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(TARGETS):
            m, n = module.weight.shape
            for adapter in adapters:
                B = 0.1 * torch.randn(m, problem.rank, generator=g)
                adapter[name] = (B.to(device), (torch.randn(problem.rank, n, generator=g) / n**0.5).to(device), 2.0)
    ids = [torch.randint(0, VOCABULARY, (problem.samples, problem.tokens), generator=g) for _ in range(problem.tasks)]
    return Built(model, adapters, [task.to(device) for task in ids])


def save_adapters(built: Built, folder: Path) -> list[str]:
    """PEFT folders of the adapters; our side reads them, and the time counts."""
    paths = []
    for task, adapter in enumerate(built.adapters):
        modules = [(name, LowRank((B * s).cpu(), A.cpu())) for name, (B, A, s) in adapter.items()]
        paths.append(
            str(
                write_adapter(folder / f"task{task}", modules, PeftMeta(task_type="FEATURE_EXTRACTION"), overwrite=True)
            )
        )
    return paths


def _loop(built: Built, problem: Problem, folder: Path, **options: Any) -> Mapping[str, Tensor]:
    options = {"max_iter": problem.solves, "alpha": ALPHA, "convergence_threshold": 0.0} | options
    return document_loop(built.model, built.adapters, built.batches(), **options).deltas


def _ours(built: Built, problem: Problem, folder: Path, **params: Any) -> Mapping[str, Tensor]:
    found = merge(
        [str(folder / f"task{task}") for task in range(problem.tasks)], method="iteris-plus", base=built.model,
        samples=problem.samples, batch_tokens=2048, device=str(built.ids[0].device),
        calibration=[_inputs(task.cpu()) for task in built.ids], params=params,
    )  # fmt: skip
    return {name: pair.delta() for name, pair in found.modules.items()}


Solve = Callable[[Built, Problem, Path], Mapping[str, Tensor]]
# Side -> (what it does, how). All but the last solve one problem.
SIDES: dict[str, tuple[str, Solve]] = {
    "document": ("the document's loop, dense", _loop),
    "sweep": ("one pass, exact in a feed-forward model", lambda *a: _ours(*a, **SAME_PROBLEM)),
    "iterate": (
        "our iteration from the adapters, as many solves",
        lambda built, problem, folder: _ours(
            built, problem, folder, **SAME_PROBLEM, init="adapters", max_iter=problem.solves, use_mats=False,
            convergence_threshold=0.0,
        ),
    ),
    "iteris-plus": ("defaults: full-weight target, held-out alpha and rho", _ours),
}  # fmt: skip
OWN_PROBLEM = "iteris-plus"


def solve(side: str, sizes: Mapping[str, int], device: str, threads: int, exact: str | None) -> dict[str, Any]:
    """One side, once: seconds, peak memory, objective, and its distance to the deltas in the file `exact`.

    Args:
        side: A name of SIDES.
        sizes: Fields of `Problem`.
        device: cpu or cuda:i.
        threads: Threads of the CPU; with one, seconds are processor time.
        exact: File of the float64 deltas of the loop's problem; None compares nothing.
    """
    problem, place = Problem(**sizes), choose_device(device)
    built = build(problem, place)
    clock = time.process_time if threads == 1 and place.type == "cpu" else time.perf_counter
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_adapters(built, folder)
        _synchronize(place)
        started = clock()
        deltas, peak = peak_above(lambda: SIDES[side][1](built, problem, folder), place)
        _synchronize(place)
        seconds = clock() - started
    objective = iteris_objective(built.model, built.adapters, built.batches(), deltas)
    error = None
    if exact is not None and side != OWN_PROBLEM:
        error = _distance(deltas, torch.load(exact, weights_only=True, map_location=place))
    return {"seconds": seconds, "peak_bytes": peak, "objective": objective, "error": error}


def solve_exactly(sizes: Mapping[str, int], path: str, device: str) -> dict[str, Any]:
    """Writes the loop's deltas in float64 throughout (model, rows, products) to a file; gives their objective."""
    problem, place = Problem(**sizes), choose_device(device)
    built = build(problem, place)
    wide = Built(
        built.model.double(),
        [{n: (B.double(), A.double(), s) for n, (B, A, s) in adapter.items()} for adapter in built.adapters],
        built.ids,
    )
    deltas = _loop(wide, problem, Path(os.devnull), gram_dtype=torch.float64)
    torch.save({name: delta.cpu() for name, delta in deltas.items()}, path)
    return {"objective": iteris_objective(wide.model, wide.adapters, wide.batches(), deltas)}


def _distance(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """Largest relative Frobenius distance of a module."""
    if found.keys() != exact.keys():
        return float("inf")
    return max(float((found[name].to(right) - right).norm() / right.norm()) for name, right in exact.items())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
