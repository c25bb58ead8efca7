"""The demo from end to end: train, merge, measure, report. No network, no download, no GPU needed."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraforge.demo.full import FULL_METHODS, FullDemo
from loraforge.demo.steps import DemoRun, Phases, Progress
from loraforge.demo.training import Recipe
from loraforge.errors import LoraforgeError
from loraforge.merging.methods import find_method
from loraforge.provenance import versions

METHODS = ("iteris-plus", "iteris", "regmean", "weighted-average", "task-arithmetic", "svd")


def run_demo(
    out: str | Path,
    *,
    methods: Sequence[str] | None = None,
    seed: int = 0,
    quick: bool = False,
    full: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains a base and one adapter a domain, merges the adapters by several methods, measures all, writes a report.

    Args:
        out: Folder of the results: base, adapters (or models), calibration, merged, results.json, picture.png,
            report.html.
        methods: Merge methods; default METHODS, or FULL_METHODS of loraforge.demo.full.
        seed: Seed of every random draw.
        quick: Two domains and few steps: shows that everything works, says nothing about the methods.
        full: Fine-tune all weights instead of adapters, and merge full models.
        overwrite: Replace an existing folder.
        progress: Called as (phase, detail, done, total).

    Returns:
        {tasks, notes, rows: [{name, kind, accuracies, mean, seconds, bytes, rank, needs}], reports, phases, sizes,
        seed, quick, inputs ("adapters" or "models"), plain_accuracy, versions, command, seconds, paths}; accuracies in
        percent, in the order of tasks.

    Raises:
        LoraforgeError: The folder exists and `overwrite` is off.
        UsageError: An unknown method.
    """
    default, kind = (FULL_METHODS, FullDemo) if full else (METHODS, DemoRun)
    out, chosen = Path(out), tuple(default if methods is None else methods)
    rows_of = {name: find_method(name) for name in chosen}
    if out.exists() and not overwrite:
        raise LoraforgeError("the output exists", where=out, hint="choose another folder, or replace it: --overwrite")
    start, phases = time.perf_counter(), Phases(progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its place and renamed at the end: a folder of that name is always a whole demo.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as draft:
        work = Path(draft) / out.name
        results = kind(work, out, Recipe().quick() if quick else Recipe(), seed, phases).results(rows_of)
        results |= {
            "seed": seed,
            "quick": quick,
            "versions": versions("torch", "transformers", "peft"),
            "command": _command(seed, full),
        }
        results |= {"phases": phases.seconds, "seconds": time.perf_counter() - start}
        _write(work, results)
        _settle(work, out)
        if out.exists():
            shutil.rmtree(out)
        work.rename(out)
    names = {kind.kind: kind.kind, "merged": "merged", "numbers": "results.json", "picture": "picture.png"}
    paths = {label: str(out / name) for label, name in (names | {"report": "report.html"}).items()}
    return results | {"paths": paths}


def _settle(work: Path, final: Path) -> None:
    """Accounts of the merges name their inputs, cards of adapters their base: puts the folder's final name there."""
    for file in [*work.glob("*/*/run.json"), *work.glob("*/*/README.md")]:
        file.write_text(file.read_text(encoding="utf-8").replace(str(work), str(final)), encoding="utf-8")


def _write(work: Path, results: dict[str, Any]) -> None:
    from loraforge.report import write_report
    from loraforge.report.charts import accuracy_chart
    from loraforge.report.plots import save_png

    (work / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    title = f"One {results['inputs'].removesuffix('s')} for {len(results['tasks'])} tasks: accuracy of each merge"
    save_png(lambda: accuracy_chart(results, title), work / "picture.png")
    write_report(work / "report.html", results)


def _command(seed: int, full: bool) -> str:
    return "loraforge demo" + (" --full" if full else "") + (f" --seed {seed}" if seed else "")
