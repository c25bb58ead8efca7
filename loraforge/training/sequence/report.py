"""The report of a run, made of its files alone; other runs may be shown beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError
from loraforge.report.sequence import write_sequence_report
from loraforge.training.sequence.layout import LOG, MATRIX, METRICS, read_json
from loraforge.training.sequence.matrix import BASE_SCORES
from loraforge.training.sequence.state import DONE, JOINT, TRAINED, read_state


def cl_report(run: str | Path, *, against: Iterable[str | Path] = (), out: str | Path | None = None) -> dict[str, Any]:
    """Writes report.html and plots/*.png of a run from its files; nothing is scored.

    Args:
        run: Folder of a training sequence with scores.
        against: Runs over the same tasks that are shown beside it.
        out: Folder to write to; default the run's.

    Returns:
        {out, files, runs: [{name, method, adapter, metrics}]}.

    Raises:
        LoraforgeError: No such run, no scores yet, or runs over other tasks.
    """
    run = Path(run).resolve()
    if not read_json(run / MATRIX):
        read_state(run)
        raise LoraforgeError("the run has no scores yet", where=run / MATRIX, hint=f"loraforge cl-eval {run}")
    folder = run if out is None else Path(out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    numbers = report_numbers(run, [Path(other).resolve() for other in against])
    files = write_sequence_report(folder, numbers)
    return {"out": str(folder), "files": [str(path) for path in files], "runs": numbers["runs"]}


def write_reports(run: Path) -> None:
    """Writes the report of a run if one of its rows is scored.

    Raises:
        OSError: The disk refuses.
    """
    numbers = report_numbers(run)
    if any(numbers["matrix"].get(adapter) for adapter in ("default", "ema")):
        write_sequence_report(run, numbers)


def report_numbers(run: Path, others: Iterable[Path] = ()) -> dict[str, Any]:
    """Everything that the report shows, as `loraforge.report.sequence` takes it.

    Raises:
        LoraforgeError: Files that are missing or damaged; runs over other tasks.
    """
    state = read_state(run)
    sequence, depends = state.content["sequence"], state.content["depends"]
    tasks = [task["id"] for task in sequence["tasks"]]
    known = {task["id"]: task for task in depends["tasks"]}
    base = read_json(run / BASE_SCORES)
    finished = [entry for entry in state.entries if entry["state"] in (TRAINED, DONE)]
    runs = [_summary(run, tasks), *(_summary(other, tasks) for other in others)]
    return {
        "name": run.name,
        "method": sequence["method"],
        "base": Path(sequence["base_model"]).name,
        "seed": depends["seed"],
        "tasks": tasks,
        "metric_names": {task: base[task]["metric"] for task in tasks if task in base},
        "matrix": read_json(run / MATRIX),
        "metrics": read_json(run / METRICS),
        "log": _log(run / LOG),
        "buffer": [
            {"task": entry["id"], "histogram": entry["buffer"]} for entry in finished if entry.get("buffer")
        ],
        "rows": [
            {
                "id": "all tasks" if entry["id"] == JOINT else entry["id"],
                "rows": entry.get("rows"),
                "steps": entry.get("steps"),
                "seconds": entry.get("seconds"),
                "scored_on": None if entry["id"] == JOINT else _scored_on(sequence, entry["id"]),
                "test_rows": known.get(entry["id"], {}).get("scored_rows"),
            }
            for entry in finished
        ],
        "runs": runs,
        "settings": {key: sequence[key] for key in ("lora", "ilora", "train", "eval", "label_space", "dtype")},
        "versions": state.content["versions"],
        "command": f"loraforge train-ilora SEQUENCE.yaml --method {sequence['method']} --seed {depends['seed']}",
        "notes": _notes(run),
    }  # fmt: skip


def _summary(run: Path, tasks: list[str]) -> dict[str, Any]:
    """One line about a run: its metrics by the adapter that stands for it."""
    content = read_state(run).content
    mine = [task["id"] for task in content["sequence"]["tasks"]]
    if mine != tasks:
        got, expected = ", ".join(mine), ", ".join(tasks)
        raise LoraforgeError(
            "the runs are over other tasks, or in another order", where=run, got=got, expected=expected
        )
    metrics = read_json(run / METRICS)
    wanted = content["depends"]["ilora"].get("final_adapter") or content["sequence"]["ilora"].get(
        "final_adapter", "ema"
    )
    adapter = next((name for name in (wanted, "ema", "default") if metrics.get(name)), "default")
    method = content["sequence"]["method"]
    return {"name": run.name, "method": method, "adapter": adapter, "metrics": metrics.get(adapter) or {}}


def _scored_on(sequence: Mapping[str, Any], task: str) -> str:
    entry = next(entry for entry in sequence["tasks"] if entry["id"] == task)
    return "test" if "test" in entry else "eval"


def _log(path: Path) -> list[dict[str, Any]]:
    """The lines of the training log that are whole."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # the last line of a run that was killed while writing it
    return found


def _notes(run: Path) -> list[str]:
    notes = list(read_json(run / "run.json").get("warnings", []))
    state = read_state(run)
    waiting = [entry["id"] for entry in state.entries if entry["state"] != DONE]
    return notes + ([f"Not finished yet: {', '.join(waiting)}."] if waiting else [])
