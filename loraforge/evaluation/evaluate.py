"""Several adapters, and the base, and full models, on several tasks: one table."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from loraforge.errors import LoraforgeError, UsageError, did_you_mean, raise_problems
from loraforge.evaluation.batches import Progress
from loraforge.evaluation.heads import Heads
from loraforge.evaluation.likelihood import CHOICE_MODES
from loraforge.evaluation.metrics import METRICS, metrics_for
from loraforge.evaluation.output import check_out, write_evaluation
from loraforge.evaluation.run import Run
from loraforge.evaluation.score import TaskScore
from loraforge.evaluation.subjects import BASE, OWN, Places, Subject, open_subjects
from loraforge.evaluation.table import averages, cell_record, differences
from loraforge.linalg.device import choose_device
from loraforge.provenance import versions
from loraforge.tasks import TaskSpec


def evaluate(
    base: str | Path | nn.Module,
    adapters: Places,
    tasks: Sequence[TaskSpec],
    *,
    models: Places = (),
    heads: Mapping[str, str] | None = None,
    own: Mapping[str, str] | None = None,
    against: str | None = None,
    metrics: str | Sequence[str] | None = None,
    choice_mode: str = "answer-mean",
    split: str = "test",
    limit: int | None = None,
    max_new_tokens: int | None = None,
    batch_tokens: int = 4096,
    device: str = "auto",
    dtype: str = "float32",
    seed: int = 0,
    outcomes: bool = False,
    tokenizer: Any = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores the base, adapters and full models on tasks.

    The base is loaded once for each class of model that the tasks need; adapters are put in by PEFT one after another.
    A classification task is answered with the row's own head, one that a merge kept apart for it, the one that `heads`
    names, or, for rows without a head, that of the task's own adapter; a row without any has an empty cell.

    Args:
        base: Folder, id in the local cache, or a model in memory.
        adapters: PEFT folders, or name -> folder.
        tasks: The columns.
        models: Fully fine-tuned models, as `adapters`.
        heads: Task -> row, head kept apart, or adapter folder whose head serves where a row has none for the task.
        own: Task -> the row that was trained for it; default: the one of its name, or whose task.json is of it.
        against: The row that the others are compared with; default the first.
        metrics: Names for every task, the main one first; default each task's own.
        choice_mode: "answer-mean", "answer-sum" or "document".
        split: "test", "eval" or "train".
        limit: Largest number of rows a task.
        max_new_tokens: Where generated answers are cut.
        batch_tokens: Tokens a forward pass.
        device: "auto", "cpu", "cuda", "cuda:0".
        dtype: Of the base's weights.
        seed: Of the choice of rows, and of the bootstrap.
        outcomes: Keep prediction and score of every row of data in the result.
        tokenizer: The base's; default: looked up in `base`.
        out: Folder for results.json, report.html and run.json.
        overwrite: Replace an earlier one.
        progress: Called with (stage, detail, done, total).

    Returns:
        JSON-ready: base, split, tasks, rows (each with its cells by task, average and normalised average), own,
        differences, settings, seconds. Scores are shares of 1.

    Raises:
        UsageError: Unknown metric, choice mode or device.
        LoraforgeError: Bad input; a row that no task can be scored for.
    """
    if choice_mode not in CHOICE_MODES:
        raise UsageError(f"unknown choice mode '{choice_mode}'", hint=did_you_mean(choice_mode, CHOICE_MODES))
    started = time.perf_counter()
    names = [metrics] if isinstance(metrics, str) else list(metrics or ())
    for name in names:
        if name not in METRICS:
            raise UsageError(f"unknown metric '{name}'", hint=did_you_mean(name, METRICS))
    if out is not None:
        check_out(out, overwrite)
    subjects = [Subject(BASE, "base"), *open_subjects(adapters, models)]
    rows = [subject.name for subject in subjects]
    if against is not None and against not in rows:
        raise LoraforgeError("--against names no row", got=against, hint=did_you_mean(against, rows))
    table = Heads(subjects[1:], _checked_tasks(tasks, split), own or {}, heads or {})
    specs = [table.fill(task) for task in tasks]
    scoring = {
        "metrics": names or None, "choice_mode": choice_mode, "max_new_tokens": max_new_tokens,
        "batch_tokens": batch_tokens, "seed": seed,
    }  # fmt: skip
    loading = {"dtype": dtype, "device": choose_device(device), "seed": seed}
    run = Run(base, specs, subjects, table, split, limit, tokenizer, scoring, loading, progress)
    run.prepare()
    run.score()
    record = _record(run, against, outcomes=outcomes)
    record["settings"] = scoring | {"limit": limit, "dtype": dtype, "device": str(loading["device"])}
    record["versions"] = versions("torch", "transformers", "peft")
    record["seconds"] = round(time.perf_counter() - started, 3)
    if out is not None:
        write_evaluation(out, record, overwrite=overwrite)
    return record


def _checked_tasks(tasks: Sequence[TaskSpec], split: str) -> Sequence[TaskSpec]:
    """The tasks, if there are any, with different names and the split.

    Raises:
        LoraforgeError: Otherwise.
    """
    problems = [
        LoraforgeError(
            f"the task has no {split} split", where=f"task '{task.id}'",
            got=", ".join(name for name in ("train", "eval", "test") if task.source(name) is not None) or "no split",
            expected=f"{split}: FILE", hint="--split names another",
        )
        for task in tasks
        if task.source(split) is None
    ]  # fmt: skip
    ids = [task.id for task in tasks]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    problems += [LoraforgeError("two tasks have the same name", got=name) for name in twice]
    if not tasks:
        problems.append(LoraforgeError("no task was named", expected="one or more"))
    raise_problems(problems)
    return tasks


def _record(run: Run, against: str | None, *, outcomes: bool) -> dict[str, Any]:
    """The result.

    Raises:
        LoraforgeError: A row without any score; `against` names none.
    """
    kept = [subject for subject in run.subjects if _has_scores(run, subject)]
    if not kept:
        raise run.unscored(run.subjects[0], run.cells[BASE])
    scored = {subject.name: run.cells[subject.name] for subject in kept}
    owners = run.heads.owners
    own = {task: run.cells[name][task] for task, name in owners.items()}
    first = against or kept[0].name
    if first not in scored:
        raise LoraforgeError("--against names a row without scores", got=first, hint=did_you_mean(first, scored))
    rows = [_row(run, subject, own, outcomes) for subject in kept]
    if len(own) == len(run.specs) and len(set(owners.values())) > 1:
        cells = {spec.id: _cell(run, owners[spec.id], spec.id, False) for spec in run.specs}
        singles = {
            "name": OWN,
            "kind": "own",
            "path": None,
            "cells": cells,
            **averages(own, own),
            "normalised_interval": None,
        }
        rows.insert(int(kept[0].kind == "base"), singles)
    return {
        "base": str(getattr(getattr(run.base, "config", None), "name_or_path", run.base)),
        "split": run.split,
        "tasks": [_task(run, spec) for spec in run.specs],
        "rows": rows,
        "own": owners,
        "differences": differences(scored, first),
    }


def _has_scores(run: Run, subject: Subject) -> bool:
    """Whether a row is shown: the base only where it has a score, others have to have one.

    Raises:
        LoraforgeError: They have none.
    """
    shown = any(isinstance(cell, TaskScore) for cell in run.cells[subject.name].values())
    if not shown and subject.kind != "base":
        raise run.unscored(subject, run.cells[subject.name])
    return shown


def _row(run: Run, subject: Subject, own: Mapping[str, TaskScore | str], outcomes: bool) -> dict[str, Any]:
    cells = {spec.id: _cell(run, subject.name, spec.id, outcomes) for spec in run.specs}
    path = None if subject.path is None else str(subject.path)
    sha256 = None if subject.adapter is None else subject.adapter.sha256
    about = {"name": subject.name, "kind": subject.kind, "path": path, "sha256": sha256}
    return about | {"cells": cells} | averages(run.cells[subject.name], own)


def _cell(run: Run, name: str, task: str, outcomes: bool) -> dict[str, Any]:
    return cell_record(run.cells[name][task], run.sources.get((name, task)), outcomes=outcomes)


def _task(run: Run, spec: TaskSpec) -> dict[str, Any]:
    main = metrics_for(run.kinds[spec.id], run.scoring["metrics"] or spec.metrics)[0]
    found: dict[str, Any] = {"id": spec.id, "kind": run.kinds[spec.id], "metric": main.name, "title": main.title}
    found["lower_is_better"] = main.lower_is_better
    data = next((data for key, data in run.data.items() if key[0] == spec.id), None)
    if data is not None:
        found |= {"n": len(data), "available": data.available, "source": data.source, "sha256": data.sha256}
    return found
