"""Does Anderson mixing (MATS) save solves? Plain iteration against mixing on toy networks, float64 numpy.

Number of solves until the relative change of all merged deltas is below 1e-6, by the independent oracle of the tests:
feed-forward stacks, residual stacks, and one module run six times (weights tied across depth). Three seeds each.

And what a step of the mixer costs on flat states: its ring buffers against a history kept as a list of states, which is
stacked, differenced and multiplied anew at every step.

    python -m benchmarks.anderson_iterations        # -> results/anderson-iterations.json, about a minute
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loraforge.bench.machine import describe
from loraforge.kernels.anderson import anderson_dots, anderson_mix
from loraforge.linalg.anderson import AndersonMixer
from tests.oracles import iteris as oracle

WIDTH, RANK, TASKS, TOKENS, LIMIT, TOLERANCE = 24, 4, 2, 240, 40, 1e-6
NETS = {
    "8 layers, ReLU": {"depth": 8, "activation": "relu", "residual": False, "tied": False, "size": 1.0},
    "8 layers, residual": {"depth": 8, "activation": "tanh", "residual": True, "tied": False, "size": 0.3},
    "16 layers, residual": {"depth": 16, "activation": "tanh", "residual": True, "tied": False, "size": 0.3},
    "1 module run 6 times": {"depth": 6, "activation": "tanh", "residual": True, "tied": True, "size": 0.5},
    "1 module run 12 times": {"depth": 12, "activation": "tanh", "residual": True, "tied": True, "size": 0.3},
}
RULES = {
    "plain": None,
    "MATS, document": oracle.Anderson(5, 1e-6, "absolute"),
    "MATS, relative": oracle.Anderson(5, 1e-6, "relative"),
}


def solves(net: dict, rule: oracle.Anderson | None, seed: int) -> int | None:
    """Solves until the change is below the tolerance; None if the limit came first."""
    g = np.random.default_rng(seed)
    count = 1 if net["tied"] else net["depth"]
    weights = [g.normal(size=(WIDTH, WIDTH)) / np.sqrt(WIDTH) for _ in range(count)]
    order = [0] * net["depth"] if net["tied"] else None
    toy = oracle.ToyNet(weights, order, net["residual"], net["activation"])
    xs = [g.normal(size=(TOKENS, WIDTH)) for _ in range(TASKS)]
    adapters = [
        [
            net["size"] * g.normal(size=(WIDTH, RANK)) @ g.normal(size=(RANK, WIDTH)) / WIDTH**0.5 / RANK**0.5
            for _ in weights
        ]
        for _ in range(TASKS)
    ]
    iterates, _ = oracle.jacobi(toy, xs, adapters, LIMIT, mats=rule, alpha_1=1e-6, alpha_2=1e-6, lam="full")
    for k in range(1, len(iterates)):
        if oracle.relative_change(iterates[k], iterates[k - 1]) < TOLERANCE:
            return k + 1
    return None


class StackedHistory:
    """The same mixing on lists of states, with the same two operators."""

    def __init__(self, history: int) -> None:
        self.history = history
        self.states: list[Tensor] = []
        self.residuals: list[Tensor] = []

    def step(self, state: Tensor, image: Tensor) -> Tensor:
        """As AndersonMixer.step with its defaults."""
        self.states = [*self.states, state][-self.history - 1 :]
        self.residuals = [*self.residuals, image - state][-self.history - 1 :]
        m = len(self.states) - 1
        if m == 0:
            return image
        residuals = torch.stack(self.residuals)
        differences = residuals[1:] - residuals[:-1]
        right = anderson_dots(differences, residuals[-1])[:m]
        normal = torch.stack([anderson_dots(differences, d)[:m] for d in differences])
        normal += 1e-6 * float(normal.diagonal().mean()) * torch.eye(m, dtype=torch.float64, device=normal.device)
        gamma = torch.linalg.lstsq(normal.cpu(), right.cpu()[:, None], driver="gelsd").solution[:, 0].to(right.device)
        padded = torch.cat([gamma.new_zeros(1), gamma, gamma.new_ones(1)])
        mixed = torch.empty_like(image)
        anderson_mix(torch.stack(self.states), residuals, padded[1:] - padded[:-1], 1.0, mixed)
        return image if float((mixed - image).norm()) > 2.0 * float(image.norm()) else mixed


def step_times(unknowns: int, history: int = 5, steps: int = 10) -> dict[str, float]:
    """Milliseconds of a step with a full history (median), for both ways of keeping it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    found = {}
    ways: dict[str, Callable[[], AndersonMixer | StackedHistory]] = {
        "stacked history": lambda: StackedHistory(history),
        "ring buffers": lambda: AndersonMixer(history),
    }
    fixed = torch.randn(unknowns, dtype=torch.float64, generator=generator).to(device)
    noise = [torch.randn(unknowns, dtype=torch.float64, generator=generator).to(device) for _ in range(4)]
    for name, make in ways.items():
        mixer, times, w = make(), [], torch.zeros_like(fixed)
        for k in range(history + steps):
            # A contraction with a little noise, so that no history degenerates.
            image = 0.5 * (w + fixed) + 1e-3 * 0.5**k * noise[k % 4]
            if device == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            w = mixer.step(w, image)
            if device == "cuda":
                torch.cuda.synchronize()
            if k >= history:
                times.append(1e3 * (time.perf_counter() - begin))
        found[name] = round(statistics.median(times), 2)
    return found


def main() -> None:
    rows = {
        name: {rule: [solves(net, how, seed) for seed in range(3)] for rule, how in RULES.items()}
        for name, net in NETS.items()
    }
    result = {
        "what": f"solves to a relative change of {TOLERANCE:g} (null: not in {LIMIT}), seeds 0 to 2",
        **describe(),
    }
    sizes = {f"{unknowns:,} unknowns, history 5": step_times(unknowns) for unknowns in (65_536, 2_000_000)}
    out = Path(__file__).with_name("results") / "anderson-iterations.json"
    whole = {**result, "solves": rows, "step_ms": sizes}
    out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    for name, row in rows.items():
        print(f"{name:24}", "  ".join(f"{rule}: {found}" for rule, found in row.items()))
    for name, ms in sizes.items():
        print(f"{name:34}", "  ".join(f"{way}: {t} ms" for way, t in ms.items()))


if __name__ == "__main__":
    main()
