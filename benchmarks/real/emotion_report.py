"""Results of the emotion benchmark as JSON entries and as a Markdown table."""

from __future__ import annotations

import datetime
import platform
from typing import Any

import numpy as np
import torch
from emotion_data import BASE_NAME, SPLIT_SEED, TASKS, TEST_ROWS
from emotion_eval import Correct, accuracies, normalised_average, paired_interval
from emotion_variants import REFERENCE, Variant

from loraforge.bench.machine import machine
from loraforge.provenance import commit

MARK = "emotion-table"


def header(owns: dict[int, Correct], bases: dict[int, Correct]) -> dict[str, Any]:
    """Where, when and on what the results were measured."""
    seeds = list(owns)
    return {
        "benchmark": "emotion",
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "base": BASE_NAME,
        "tasks": list(TASKS),
        "test_rows": TEST_ROWS,
        "split_seed": SPLIT_SEED,
        "own_accuracy": {str(seed): accuracies(owns[seed]) for seed in seeds},
        "base_accuracy": {str(seed): accuracies(bases[seed]) for seed in seeds},
        "base_normalised": normalised_average([bases[s] for s in seeds], [owns[s] for s in seeds]),
    }


def entry(
    variant: Variant, seeds: list[int], runs: list[dict[str, Any]], plain: list[Correct], owns: list[Correct]
) -> dict[str, Any]:
    """One merge at one sample size: scores, paired 95 % interval of the difference to the plain average, seconds."""
    merges = [run["correct"] for run in runs]
    score, reference = normalised_average(merges, owns), normalised_average(plain, owns)
    low, high = paired_interval(merges, plain, owns)
    return {
        "method": variant.method,
        "params": dict(variant.params),
        "weights": variant.weights,
        "rank": variant.rank,
        "seeds": seeds,
        "accuracy": {str(s): accuracies(m) for s, m in zip(seeds, merges, strict=True)},
        "normalised": score,
        "normalised_by_seed": [normalised_average([m], [o]) for m, o in zip(merges, owns, strict=True)],
        "difference": score - reference,
        "difference_interval": [low, high],
        "seconds": float(np.median([run["seconds"]["merge"] for run in runs])),
        "code": sorted({run["code"] for run in runs}),
    }


def cell(row: dict[str, Any] | None, seeds: list[int]) -> str:
    """Score, and the difference to the plain average with its interval; the seeds where they are not all of them."""
    if row is None:
        return ""
    low, high = row["difference_interval"]
    note = "" if row["seeds"] == seeds else f" [seeds {', '.join(map(str, row['seeds']))}]"
    return f"{row['normalised']:.3f} ({row['difference']:+.3f}, {low:+.3f} to {high:+.3f}){note}"


def table(results: dict[str, Any]) -> str:
    """Markdown between markers: one row a merge, one column a sample size, and the time of a merge."""
    merges = results["merges"]
    sizes = sorted({int(size) for rows in merges.values() for size in rows} - {0})
    seeds = sorted({seed for rows in merges.values() for row in rows.values() for seed in row["seeds"]})
    means = [np.mean([own[task] for own in results["own_accuracy"].values()]) for task in results["tasks"]]
    own = ", ".join(f"{task} {mean:.3f}" for task, mean in zip(results["tasks"], means, strict=True))
    codes = {code for rows in merges.values() for row in rows.values() for code in row["code"]}
    mixed = " The rows come from different states of the library." if len(codes) > 1 else ""
    lines = [
        f"<!-- {MARK}:begin -->",
        f"Normalised average over {len(results['tasks'])} tasks and seeds {', '.join(map(str, seeds))} (own adapters: "
        f"1 = {own}; no adapter: {results['base_normalised']:.3f}). In brackets: difference to {REFERENCE} and its "
        f"paired 95 % interval over test rows. {results['machine']}, {results['threads']} threads, torch "
        f"{results['torch']}, commit {results['commit']}, {results['date']}.{mixed}",
        "",
        f"| merge | {' | '.join(f'{size} samples a task' for size in sizes) or 'score'} | seconds |",
        f"|---|{'---|' * max(1, len(sizes))}---|",
    ]
    for name, rows in merges.items():
        if "0" in rows:
            cells = [cell(rows["0"], seeds), *[""] * (len(sizes) - 1)]
        else:
            cells = [cell(rows.get(str(size)), seeds) for size in sizes]
        seconds = rows[max(rows, key=int)]["seconds"]
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds:.1f} |")
    return "\n".join([*lines, f"<!-- {MARK}:end -->"])
