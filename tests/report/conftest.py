"""A hand-made report of a calibrated merge and the results of a demo, in the shape that the program makes."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

TASKS = ["rotated", "mirrored", "inverted", "sheared", "occluded", "noisy", "striped", "shifted"]
LEAVES = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")
MODULES = [f"vit.layers.{layer}.{leaf}" for layer in range(2) for leaf in LEAVES]
MEANS = {
    "iteris-plus": 52.5,
    "iteris": 50.75,
    "regmean": 50.25,
    "weighted-average": 44.5,
    "task-arithmetic": 10.5,
    "svd": 21.25,
}


def make_report(method: str = "iteris-plus", calibrated: bool = True) -> dict[str, Any]:
    """The report of one merge of eight adapters on 12 modules."""
    spectrum = [8.0 * math.exp(-0.25 * i) for i in range(32)]
    report: dict[str, Any] = {
        "method": method,
        "params": {"init": "sweep", "alpha_1": "auto", "use_camr": True},
        "adapters": [
            {"path": f"adapters/{task}", "sha256": f"{i:02x}" * 32, "modules": 12, "ranks": [4]}
            for i, task in enumerate(TASKS)
        ],
        "modules": len(MODULES),
        "rank_max": 32,
        "parameters": 196608,
        "relative_error": 0.0,
        "kept_energy": 1.0,
        "seconds": 3.25,
        "phases": {"read": 0.125, "collect": 2.0, "solve": 1.0, "write": 0.125},
        "peak_rss_bytes": 512 * 2**20,
        "device": "cpu",
        "kernels": {"mode": "auto", "native": True, "why": "built", "calls": {"gram_": {"blocks": 144}}},
        "weights": [1.0] * len(TASKS),
        "warnings": ["3 modules have fewer than 8 tokens an input feature"],
        "layers": [
            {
                "module": module,
                "rank": 32,
                "kept_energy": 1.0,
                "relative_error": 1e-8,
                "norm": 9.5 + i,
                "spectrum": [value * (1 + 0.04 * i) for value in spectrum],
            }
            for i, module in enumerate(MODULES)
        ],
    }
    if calibrated:
        report["calibration"] = [
            {"name": task, "source": f"{task}.safetensors", "sha256": "ab" * 32, "samples": 256, "available": 400}
            for task in TASKS
        ]
        report["iteris"] = {
            "layers": [
                {
                    "module": module,
                    "tokens": [2000] * 8,
                    "lambda": [0.5 + 0.1 * k for k in range(8)],
                    "ess": 0.4 + 0.04 * i,
                    "sigma": 0.4,
                    "tau": 0.1,
                    "alpha": 1e-3 * (i + 1),
                    "rho": 0.25,
                    "heldout_gain": 0.04,
                    "condition": 1234.5,
                    "residual_before": 0.9 - 0.01 * i,
                    "residual_after": 0.5 - 0.01 * i,
                    "kept_energy": 1.0,
                    "solver": "cholesky",
                }
                for i, module in enumerate(MODULES)
            ],
            "iterations": [
                {"k": k, "relative_change": 10.0 ** (-2 * k), "residual": 10.0 ** (-k)} for k in range(1, 5)
            ],
            "converged": True,
            "verified": 1e-12,
        }
    return report


def _row(name: str, kind: str, mean: float, **extra: Any) -> dict[str, Any]:
    accuracies = [mean + shift for shift in (3.0, -3.0, -8.5, 1.5, 7.0, 4.0, 5.5, -9.5)]
    return {"name": name, "kind": kind, "accuracies": accuracies, "mean": mean, "seconds": 0.0, "bytes": 0} | extra


@pytest.fixture
def report() -> dict[str, Any]:
    return make_report()


@pytest.fixture
def plain_report() -> dict[str, Any]:
    """The report of a method that uses no calibration data."""
    return make_report("weighted-average", calibrated=False)


@pytest.fixture
def results() -> dict[str, Any]:
    return copy.deepcopy(make_results())


def make_results() -> dict[str, Any]:
    """The results of a demo with eight tasks and six merges."""
    rows = [_row("base", "base", 41.0), _row("separate adapters", "adapter", 91.0, seconds=60.5, bytes=1234567)]
    for i, (name, mean) in enumerate(MEANS.items()):
        rows.append(_row(name, "merge", mean, seconds=3.25 + i, bytes=345678 + i, rank=32, needs="calibration"))
    return {
        "tasks": TASKS,
        "notes": {task: f"what {task} means" for task in TASKS},
        "rows": rows,
        "reports": {name: make_report(name, calibrated=i < 3) for i, name in enumerate(MEANS)},
        "phases": {"train base": 20.125, "train adapters": 60.5},
        "sizes": {"train": 1200, "test": 597, "calibration": 400},
        "seed": 7,
        "versions": {"torch": "2.11.0", "peft": "0.18.0"},
        "command": "loraforge demo --seed 7",
        "seconds": 99.5,
    }
