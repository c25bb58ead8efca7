"""Results of the six-task benchmark: what lies in a work folder as JSON, and the tables of the README."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tasks_data import BASE_NAME, MAX_TOKENS, SPLIT_SEED, TASKS, TEST_ROWS
from tasks_merge import read_json
from tasks_scores import accuracies, normalised, over_seeds, paired_interval
from tasks_sequence import RUNS, settings_of, summary_file
from tasks_train import BATCH, LEARNING_RATE, LORA, STEPS
from tasks_variants import (
    REFERENCE,
    SAMPLES,
    SEEDS,
    Variant,
    ablation_variants,
    count_variants,
    six_variants,
)

from loraforge.bench.machine import machine
from loraforge.provenance import commit

Row = dict[str, Any]
MARK = "tasks-table"
PLAIN_SUM = "task-arithmetic 0.3"
SEQUENCE_METRICS = ("acc", "bwt", "forgetting", "learning_acc")


def versions() -> dict[str, str]:
    """Versions of what computes."""
    import peft
    import transformers

    found = {"python": platform.python_version(), "torch": torch.__version__}
    return found | {"transformers": transformers.__version__, "peft": peft.__version__, "numpy": np.__version__}


def assemble(work: Path, earlier: Row | None) -> Row:
    """All finished units of a work folder; figures of the machine are those of the run that first wrote a results file.

    Args:
        work: The work folder.
        earlier: What the results file holds, whose tables that are not in the work folder are kept.
    """
    owns = {seed: read_json(file) for seed in SEEDS if (file := score_file(work, seed, "own")).is_file()}
    found: Row = {
        "benchmark": "tasks",
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        **versions(),
        "base": BASE_NAME,
        "tasks": list(TASKS),
        "test_rows": TEST_ROWS,
        "split_seed": SPLIT_SEED,
        "samples": SAMPLES,
        "training": {**LORA, "steps": STEPS, "batch": BATCH, "learning_rate": LEARNING_RATE, "tokens": MAX_TOKENS},
        "own_accuracy": {str(seed): accuracies(own["own"]) for seed, own in owns.items()},
        "base_accuracy": {str(seed): accuracies(own["base"]) for seed, own in owns.items()},
        "train_processor_seconds": train_seconds(work),
    }
    if owns:
        found["base_normalised"] = normalised([o["base"] for o in owns.values()], [o["own"] for o in owns.values()])
        found["six"] = merge_rows(work, six_variants(), owns)
        found["ablation"] = merge_rows(work, ablation_variants(), owns)
        leading = [v for v in six_variants() if v.name in leading_names(found["six"])]
        found["counts"] = merge_rows(work, count_variants(leading), owns)
    found["sequence"] = sequence_rows(work)
    for key in ("check",):
        if earlier and key in earlier:
            found.setdefault(key, earlier[key])
    return found


def score_file(work: Path, seed: int, key: str) -> Path:
    """Where the scores of a merge are."""
    return work / "scores" / f"seed{seed}" / f"{key}.json"


def train_seconds(work: Path) -> float | None:
    """Median processor seconds of training one adapter."""
    files = [work / "times" / f"train-seed{seed}-{name}.json" for seed in SEEDS for name in TASKS]
    seconds = [read_json(file)["processor_seconds"] for file in files if file.is_file()]
    return float(np.median(seconds)) if seconds else None


def merge_rows(work: Path, variants: Iterable[Variant], owns: dict[int, Row]) -> list[Row]:
    """An entry a merge that is there for at least one seed, against the reference over the same tasks and seeds."""
    rows = []
    for variant in variants:
        plain = Variant(REFERENCE, REFERENCE, tasks=variant.tasks)
        runs = {
            seed: (read_json(file), read_json(other))
            for seed in owns
            if (file := score_file(work, seed, variant.key)).is_file()
            and (other := score_file(work, seed, plain.key)).is_file()
        }
        if runs:
            rows.append(entry(variant, runs, owns))
    return rows


def entry(variant: Variant, runs: dict[int, tuple[Row, Row]], owns: dict[int, Row]) -> Row:
    """One merge: scores, paired 95 % interval of the difference to the plain average, seconds."""
    seeds = list(runs)
    mine, plain = [runs[s][0]["correct"] for s in seeds], [runs[s][1]["correct"] for s in seeds]
    own = [{task: owns[s]["own"][task] for task in variant.tasks} for s in seeds]
    score = normalised(mine, own)
    found = {
        "name": variant.name,
        "method": variant.method,
        "params": dict(variant.params),
        "weight": variant.weight,
        "tasks": list(variant.tasks),
        "seeds": seeds,
        "accuracy": {str(s): accuracies(m) for s, m in zip(seeds, mine, strict=True)},
        "normalised": score,
        "normalised_by_seed": [normalised([m], [o]) for m, o in zip(mine, own, strict=True)],
        "difference": score - normalised(plain, own),
        "difference_interval": list(paired_interval(mine, plain, own)),
        "seconds": float(np.median([run["seconds"]["merge"] for run, _ in runs.values()])),
        "processor_seconds": float(np.median([run["seconds"]["processor"] for run, _ in runs.values()])),
        "folder": runs[seeds[0]][0]["folder"],
        "code": sorted({run["code"] for run, _ in runs.values()}),
    }
    return found


def leading_names(rows: Sequence[Row], count: int = 5) -> list[str]:
    """The merges of all tasks that fewer tasks are merged by too: the best ones over all seeds, and the plain sum."""
    names: dict[tuple[float, ...], str] = {}  # two methods may be one: `concat` is the plain sum
    for row in sorted(rows, key=lambda row: -row["normalised"]):
        if row["name"] not in (REFERENCE, PLAIN_SUM):
            names.setdefault(tuple(row["normalised_by_seed"]), row["name"])
    plain = next((tuple(row["normalised_by_seed"]) for row in rows if row["name"] == PLAIN_SUM), ())
    names.pop(plain, None)
    return [*list(names.values())[:count], PLAIN_SUM]


def sequence_rows(work: Path) -> list[Row]:
    """An entry a run of the sequence and adapter: metrics with Student's interval over the seeds."""
    rows = []
    for run in RUNS:
        found = {seed: read_json(file) for seed in SEEDS if (file := summary_file(work, run, seed)).is_file()}
        for adapter in dict.fromkeys(name for summary in found.values() for name in summary["metrics"]):
            values = {key: [s["metrics"][adapter][key] for s in found.values()] for key in SEQUENCE_METRICS}
            metrics = {key: None if None in shares else over_seeds(shares) for key, shares in values.items()}
            row = {"run": run, "adapter": adapter, "seeds": list(found), "settings": settings_of(run), **metrics}
            row["matrix"] = {str(seed): summary["matrix"][adapter] for seed, summary in found.items()}
            for key in ("seconds", "processor_seconds"):
                row[key] = float(np.median([summary[key] for summary in found.values()]))
            rows.append(row)
    compare_with_replay(rows)
    return rows


def compare_with_replay(rows: list[Row]) -> None:
    """Adds to each run the difference of its ACC to plain replay, seed by seed, with Student's interval."""
    replay = next((row for row in rows if row["run"] == "er"), None)
    for row in rows:
        if replay is None or row is replay:
            continue
        pairs = [
            (mine, other)
            for seed, mine in zip(row["seeds"], row["acc"]["values"], strict=True)
            for at, other in zip(replay["seeds"], replay["acc"]["values"], strict=True)
            if seed == at
        ]
        if pairs:
            row["acc_minus_er"] = over_seeds([mine - other for mine, other in pairs])


def cell(row: Row | None, seeds: Sequence[int]) -> str:
    """Score, and the difference to the plain average with its interval; the seeds where they are not all of them."""
    if row is None:
        return ""
    low, high = row["difference_interval"]
    note = "" if row["seeds"] == list(seeds) else f" [seeds {', '.join(map(str, row['seeds']))}]"
    if row["name"] == REFERENCE:
        return f"{row['normalised']:.3f}{note}"
    return f"{row['normalised']:.3f} ({row['difference']:+.3f}, {low:+.3f} to {high:+.3f}){note}"


def task_means(rows: Sequence[dict[str, float]], tasks: Sequence[str]) -> list[str]:
    """Accuracy in per cent a task, mean over seeds."""
    return [f"{100 * np.mean([row[task] for row in rows]):.1f}" for task in tasks]


def heading(results: Row) -> str:
    """Where and on what the figures were measured."""
    return (
        f"{results['machine']}, torch {results['torch']}, transformers {results['transformers']}, peft "
        f"{results['peft']}, commit {results['commit']}, {results['date']}. Seconds are processor "
        "time of one thread; those of a merge include reading the adapters and writing the result."
    )


def six_table(results: Row) -> list[str]:
    """Every method over all tasks, best first; those that ran on fewer seeds after the others."""
    tasks, seeds = results["tasks"], sorted(map(int, results["own_accuracy"]))
    lines = [
        f"| merge of {len(tasks)} | normalised average | {' | '.join(tasks)} | seconds |",
        f"|---|---|{'---|' * (len(tasks) + 1)}",
        f"| own adapter each | 1 | {' | '.join(task_means(list(results['own_accuracy'].values()), tasks))} | |",
    ]
    # Scores of fewer seeds do not compare with those of all: such rows come last, by their difference.
    key = lambda row: (-len(row["seeds"]), -row["difference"])  # noqa: E731
    for row in sorted(results["six"], key=key):
        means = " | ".join(task_means(list(row["accuracy"].values()), tasks))
        lines.append(f"| {row['name']} | {cell(row, seeds)} | {means} | {row['processor_seconds']:.1f} |")
    base = " | ".join(task_means(list(results["base_accuracy"].values()), tasks))
    return [*lines, f"| no adapter | {results['base_normalised']:.3f} | {base} | |"]


def count_table(results: Row) -> list[str]:
    """The leading merges over 2, 3, ... tasks; a column a number of tasks."""
    seeds = sorted(map(int, results["own_accuracy"]))
    counts: list[int] = sorted({len(row["tasks"]) for row in results["counts"]})
    cells: dict[str, dict[int, Row]] = {}
    for row in [*results["counts"], *results["six"]]:
        cells.setdefault(row["name"], {})[len(row["tasks"])] = row
    names = list(dict.fromkeys(row["name"] for row in results["counts"]))
    counts.append(len(results["tasks"]))
    lines = [f"| merge | {' | '.join(f'{count} tasks' for count in counts)} |", f"|---|{'---|' * len(counts)}"]
    return lines + [f"| {n} | {' | '.join(cell(cells[n].get(count), seeds) for count in counts)} |" for n in names]


def ablation_table(results: Row) -> list[str]:
    """`iteris-plus` with its switches."""
    seeds = sorted(map(int, results["own_accuracy"]))
    lines = ["| iteris-plus | normalised average | seconds |", "|---|---|---|"]
    rows = [row for row in results["ablation"] if row["name"] != REFERENCE]
    return lines + [f"| {row['name']} | {cell(row, seeds)} | {row['processor_seconds']:.1f} |" for row in rows]


def spread(found: Row, scale: float = 100.0) -> str:
    """Mean with its interval over seeds."""
    if found["low"] is None:
        return f"{scale * found['mean']:.1f}"
    return f"{scale * found['mean']:.1f} ({scale * found['low']:.1f} to {scale * found['high']:.1f})"


def sequence_table(results: Row) -> list[str]:
    """Runs of the sequence: per cent, mean and Student's interval over the seeds."""
    lines = [
        "| run | adapter | ACC | BWT | forgetting | learning accuracy | ACC less that of er | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["sequence"]:
        shown = [spread(row[key]) if row[key] is not None else "" for key in SEQUENCE_METRICS]
        less = spread(row["acc_minus_er"]) if "acc_minus_er" in row else ""
        lines.append(
            f"| {row['run']} | {row['adapter']} | {' | '.join(shown)} | {less} | {row['processor_seconds']:.0f} |"
        )
    return lines


def table(results: Row) -> str:
    """Markdown of all that there is, each table between markers."""
    makers: dict[str, Callable[[Row], list[str]]] = {
        "six": six_table, "counts": count_table, "ablation": ablation_table, "sequence": sequence_table,
    }  # fmt: skip
    parts = [heading(results)]
    for key, maker in makers.items():
        if results.get(key):
            parts.append("\n".join([f"<!-- {MARK}-{key}:begin -->", *maker(results), f"<!-- {MARK}-{key}:end -->"]))
    return "\n\n".join(parts)
