"""`iteris-plus` against a straightforward PyTorch implementation of the document's loop, in one run.

A 6-layer, d=384 BERT-shaped model with random weights, 3 adapters of rank 8 on all its linear modules, 3 x 64 samples
of 64 tokens. Each side runs in a process of its own (so that peak memory is its
own), one thread, in turn, several times. Quality is the IterIS objective on the calibration data, computed by a third
piece of code for both results.

    python -m benchmarks.iteris_against_loop [--runs 3] [--out benchmarks/results/iteris-against-loop.json]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAYERS, WIDTH, HEADS, RANK, TASKS, SAMPLES, TOKENS = 6, 384, 12, 8, 3, 64, 64
ALPHA, ITERATIONS = 1e-7, 10
TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
SIDES = {
    "loop": "the document's loop: plain iteration, dense, 10 solves",
    "iteris-plus": "defaults (full-weight target, held-out alpha and rho)",
    "iteris-plus-same-problem": "the sweep on the loop's own problem: its alpha, rho, lambda and target",
}


def build():
    """The model, adapters {module: [(B, A, s)]} and batches a task; the same in every process."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=2000, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH, max_position_embeddings=TOKENS,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()
    g = torch.Generator().manual_seed(1)
    adapters = {}
    for name, module in model.named_modules():
        if name.endswith(TARGETS):
            m, n = module.weight.shape
            adapters[name] = [
                (0.1 * torch.randn(m, RANK, generator=g), torch.randn(RANK, n, generator=g) / n**0.5, 2.0)
                for _ in range(TASKS)
            ]
    ids = [torch.randint(0, 2000, (SAMPLES, TOKENS), generator=g) for _ in range(TASKS)]
    return model, adapters, ids


def by_task(adapters):
    """One {module: (B, A, s)} an adapter."""
    return [{name: pairs[task] for name, pairs in adapters.items()} for task in range(TASKS)]


def save_adapters(folder: Path, adapters) -> list[str]:
    """PEFT folders of the adapters."""
    from loraforge.adapters import PeftMeta, write_adapter
    from loraforge.types import LowRank

    paths = []
    for task in range(TASKS):
        modules = [(name, LowRank(p[task][0] * p[task][2], p[task][1])) for name, p in adapters.items()]
        meta = PeftMeta(task_type="FEATURE_EXTRACTION")
        paths.append(str(write_adapter(folder / f"task{task}", modules, meta, overwrite=True)))
    return paths


def run_side(side: str, folder: Path) -> None:
    """One side in this process; writes its deltas and prints its figures."""
    import torch

    import loraforge
    from loraforge.bench.peers.document_loop import document_loop

    torch.set_num_threads(1)
    model, adapters, ids = build()
    paths = save_adapters(folder / side, adapters)
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    if side.startswith("loop"):
        batches = [
            [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in task.split(16)] for task in ids
        ]
        result = document_loop(model, by_task(adapters), batches, max_iter=ITERATIONS, alpha=ALPHA)
        deltas = result.deltas
    else:
        same = {"alpha_1": ALPHA, "alpha_2": ALPHA, "reg_ceof": 0.0, "lambda_weight": "full", "with_pretrain_matrix": 0,
                "use_camr": False, "use_dcs": False}  # fmt: skip
        merged = loraforge.merge(
            paths, method="iteris-plus", base=model, samples=SAMPLES, batch_tokens=2048,
            calibration=[{"input_ids": task, "attention_mask": torch.ones_like(task)} for task in ids],
            params=same if side.endswith("same-problem") else {},
        )  # fmt: skip
        deltas = {name: pair.delta() for name, pair in merged.modules.items()}
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    torch.save({k: v.float() for k, v in deltas.items()}, folder / f"{side}.pt")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_seconds": cpu,
                "peak_rss_bytes": after.ru_maxrss * 1024,
                "rss_before_bytes": before.ru_maxrss * 1024,
            }
        )
    )


def objective(folder: Path, side: str) -> float:
    """The IterIS objective of one side's deltas on the calibration data: missed share of the task outputs."""
    import torch

    from loraforge.bench.peers.objective import iteris_objective

    model, adapters, ids = build()
    batches = [[{"input_ids": p, "attention_mask": torch.ones_like(p)} for p in task.split(16)] for task in ids]
    return float(
        iteris_objective(model, by_task(adapters), batches, torch.load(folder / f"{side}.pt", weights_only=True))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/iteris-against-loop.json"))
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.side:
        run_side(options.side, options.folder)
        return
    from loraforge.bench.machine import describe

    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(options.runs):
            for side in SIDES:  # in turn, so that a slow minute of the machine hits every side
                command = [sys.executable, "-m", "benchmarks.iteris_against_loop", "--side", side, "--folder", name]
                done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
                runs[side].append(json.loads(done.stdout.strip().splitlines()[-1]))
                print(side, runs[side][-1], flush=True)
        objectives = {side: objective(folder, side) for side in SIDES}
    median = {
        side: {key: statistics.median(r[key] for r in done) for key in done[0]} | {"objective": objectives[side]}
        for side, done in runs.items()
    }
    ratios = {
        side: {
            key: statistics.median(a[key] / b[key] for a, b in zip(runs["loop"], runs[side], strict=True))
            for key in ("seconds", "cpu_seconds", "peak_rss_bytes")
        }
        for side in SIDES
    }
    result = {"what": SIDES, **describe(), "runs": options.runs, "median": median, "loop_over_side": ratios}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
