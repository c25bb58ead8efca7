"""Does Anderson mixing (MATS) save solves? Plain iteration against mixing on toy networks, float64 numpy.

Number of solves until the relative change of all merged deltas is below 1e-6, by the independent oracle of the tests:
feed-forward stacks, residual stacks, and one module run six times (weights tied across depth). Three seeds each.

    python -m benchmarks.anderson_iterations        # -> results/anderson-iterations.json, about a minute
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.machine import describe
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


def main() -> None:
    rows = {
        name: {rule: [solves(net, how, seed) for seed in range(3)] for rule, how in RULES.items()}
        for name, net in NETS.items()
    }
    result = {
        "what": f"solves to a relative change of {TOLERANCE:g} (null: not in {LIMIT}), seeds 0 to 2",
        **describe(),
    }
    out = Path(__file__).with_name("results") / "anderson-iterations.json"
    out.write_text(json.dumps({**result, "solves": rows}, indent=1) + "\n", encoding="utf-8")
    for name, row in rows.items():
        print(f"{name:24}", "  ".join(f"{rule}: {found}" for rule, found in row.items()))


if __name__ == "__main__":
    main()
