"""Several adapters, and the base, and full models, on several tasks: one table."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from loraforge.calibrate.encode import load_tokenizer
from loraforge.errors import LoraforgeError, UsageError, did_you_mean, raise_problems
from loraforge.evaluation.batches import Progress
from loraforge.evaluation.heads import Head, Heads, NoHead
from loraforge.evaluation.likelihood import CHOICE_MODES
from loraforge.evaluation.metrics import LABELLED, METRICS, metrics_for
from loraforge.evaluation.output import check_out, write_evaluation
from loraforge.evaluation.score import TaskScore, score_task
from loraforge.evaluation.subjects import BASE, OWN, Places, Subject, adapted, open_subjects
from loraforge.evaluation.swapping import swapped
from loraforge.evaluation.table import averages, cell_record, differences
from loraforge.linalg.device import choose_device
from loraforge.tasks import TaskData, TaskSpec, load_model, load_task, resolve_kind, task_labels, task_type_of


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
    run = _Run(base, specs, subjects, table, split, limit, tokenizer, scoring, loading, progress)
    run.prepare()
    run.score()
    record = run.record(against, outcomes=outcomes)
    record["settings"] = scoring | {"limit": limit, "dtype": dtype, "device": str(loading["device"])}
    record["versions"] = {name: version(name) for name in ("torch", "transformers", "peft")}
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


@dataclass(slots=True)
class _Run:
    """One evaluation while it runs."""

    base: Any
    specs: list[TaskSpec]
    subjects: list[Subject]
    heads: Heads
    split: str
    limit: int | None
    tokenizer: Any
    scoring: dict[str, Any]
    loading: dict[str, Any]
    progress: Progress | None
    kinds: dict[str, str] = field(default_factory=dict)
    data: dict[tuple[str, tuple[str, ...] | None, str], TaskData] = field(default_factory=dict)
    cells: dict[str, dict[str, TaskScore | str]] = field(default_factory=dict)
    sources: dict[tuple[str, str], str] = field(default_factory=dict)

    def prepare(self) -> None:
        """Kinds and metrics of all tasks, before any weight is read.

        Raises:
            LoraforgeError: A task that the base cannot do, or a metric that it has not; all problems at once.
        """
        problems: list[LoraforgeError] = []
        for spec in self.specs:
            try:
                self.kinds[spec.id] = resolve_kind(spec, base=self.base)
                metrics_for(self.kinds[spec.id], self.scoring["metrics"] or spec.metrics, f"task '{spec.id}'")
                if self.kinds[spec.id] in LABELLED and spec.labels is None and spec.train is None:
                    raise LoraforgeError(
                        "the classes of the task are not known", where=f"task '{spec.id}'",
                        expected="`labels` or `train` in the task, or an adapter of ours, whose task.json says them",
                        hint="--labels A,B names them in the head's order",
                    )  # fmt: skip
            except LoraforgeError as problem:
                problems.append(problem)
        raise_problems(problems)
        misplaced = map(self._misplaced, self.subjects)
        raise_problems([found for found in misplaced if found is not None])
        if self.tokenizer is None and set(self.kinds.values()) != {"images"}:
            folder = getattr(getattr(self.base, "config", None), "name_or_path", None) or self.base
            self.tokenizer = load_tokenizer(folder, "evaluation")

    def score(self) -> None:
        """Fills the cells, one class of base in memory at a time."""
        self.cells = {subject.name: {} for subject in self.subjects}
        groups: dict[object, list[TaskSpec]] = {}
        for spec in self.specs:
            kind = self.kinds[spec.id]
            groups.setdefault((task_type_of(kind), kind == "images"), []).append(spec)
        for group in groups.values():
            self._score_group(group)
        for name, cells in self.cells.items():
            self.cells[name] = {spec.id: cells[spec.id] for spec in self.specs}

    def _score_group(self, specs: list[TaskSpec]) -> None:
        """The tasks that one class of model serves: each full model, then the base with each adapter."""
        models = [subject for subject in self.subjects if subject.kind == "model"]
        # Those that a task belongs to come first: the others may need their heads.
        for subject in sorted(models, key=lambda subject: subject.name not in self.heads.owners.values()):
            for spec in specs:
                # Each for itself: the head of a full model is told from a made-up one by its classes.
                whole = self._load(subject.path, spec, subject.card)
                self._score_cell(subject, spec, whole.model, whole)
                del whole
        gc.collect()
        loaded = self._load(self.base, specs[0])
        for subject in self.subjects:
            if subject.kind == "model":
                continue
            with adapted(loaded.model, subject) as model:
                for spec in specs:
                    self._score_cell(subject, spec, model, loaded)
        del loaded, model
        gc.collect()

    def _load(self, place: Any, spec: TaskSpec, card: Mapping[str, Any] | None = None) -> _Loaded:
        kind = self.kinds[spec.id]
        labels: tuple[str, ...] = ()
        if kind in LABELLED:
            labels = tuple(card["labels"]) if card is not None and card["labels"] else task_labels(spec)
        model, config, fresh = load_model(place, kind, head_labels=labels, **self.loading)
        return _Loaded(model.eval(), config, fresh, labels)

    def _score_cell(self, subject: Subject, spec: TaskSpec, model: nn.Module, loaded: _Loaded) -> None:
        kind, cells = self.kinds[spec.id], self.cells[subject.name]
        self._tell(subject, spec)
        if kind not in LABELLED:
            cells[spec.id] = self._scored(spec, model, loaded, None)
            return
        native = not loaded.fresh and (subject.kind == "model" or loaded.labels == task_labels(spec))
        try:
            head = self.heads.of(subject, spec, native)
            tensors = head.tensors or {}
            bare = [name for name in loaded.fresh if not any(key.startswith(f"{name}.") for key in tensors)]
            if bare:
                raise NoHead(f"neither the base's file nor the head has weights of {', '.join(bare)}")
        except NoHead as missing:
            cells[spec.id] = str(missing)
            return
        if subject.kind == "model":
            self.heads.learn(spec, subject, head, model)
        with swapped(model, tensors, head.source):
            cells[spec.id] = self._scored(spec, model, loaded, head)
        self.sources[subject.name, spec.id] = head.source

    def _scored(self, spec: TaskSpec, model: nn.Module, loaded: _Loaded, head: Head | None) -> TaskScore:
        labels, space = (None, "shared") if head is None else (head.labels, head.space)
        key = (spec.id, labels, space)
        if key not in self.data:
            self.data[key] = load_task(
                spec, self.split, tokenizer=self.tokenizer, config=loaded.config, base=self.base, head_labels=labels,
                label_space=space, limit=self.limit, seed=self.scoring["seed"],
            )  # fmt: skip
        return score_task(model, self.data[key], tokenizer=self.tokenizer, progress=self.progress, **self.scoring)

    def _tell(self, subject: Subject, spec: TaskSpec) -> None:
        if self.progress is not None:
            done = sum(len(cells) for cells in self.cells.values())
            self.progress("cells", f"{subject.name} on {spec.id}", done, len(self.subjects) * len(self.specs))

    def record(self, against: str | None, *, outcomes: bool) -> dict[str, Any]:
        """The result.

        Raises:
            LoraforgeError: A row without any score; `against` names no row.
        """
        kept = [subject for subject in self.subjects if self._has_scores(subject)]
        scored = {subject.name: self.cells[subject.name] for subject in kept}
        own = {task: self.cells[name][task] for task, name in self.heads.owners.items()}
        first = against or kept[0].name
        if first not in scored:
            raise LoraforgeError("--against names no row", got=first, hint=did_you_mean(first, scored))
        rows = [self._row(subject, own, outcomes) for subject in kept]
        if len(own) == len(self.specs) and len(set(self.heads.owners.values())) > 1:
            cells = {task: self._cell(name, task, False) for task, name in self.heads.owners.items()}
            rows.insert(
                int(kept[0].kind == "base"),
                {"name": OWN, "kind": "own", "path": None, "cells": cells, **averages(own, own)},
            )
        return {
            "base": str(getattr(getattr(self.base, "config", None), "name_or_path", self.base)),
            "split": self.split,
            "tasks": [self._task(spec) for spec in self.specs],
            "rows": rows,
            "own": self.heads.owners,
            "differences": differences(scored, first),
        }

    def _has_scores(self, subject: Subject) -> bool:
        """Whether a row is shown: the base only where it has a score, others have to have one.

        Raises:
            LoraforgeError: They have none.
        """
        reasons = {task: cell for task, cell in self.cells[subject.name].items() if isinstance(cell, str)}
        if len(reasons) < len(self.specs):
            return True
        if subject.kind == "base":
            return False
        raise self._unscored(subject, reasons)

    def _misplaced(self, subject: Subject) -> LoraforgeError | None:
        """What is wrong with an adapter whose head is of none of the tasks; known before any weight is read."""
        if not subject.heads:
            return None
        reasons: dict[str, str] = {}
        for spec in self.specs:
            try:
                if self.kinds[spec.id] not in LABELLED or self.heads.of(subject, spec, native=False):
                    return None
            except NoHead as missing:
                reasons[spec.id] = str(missing)
        return self._unscored(subject, reasons)

    def _unscored(self, subject: Subject, reasons: Mapping[str, str]) -> LoraforgeError:
        return LoraforgeError(
            f"'{subject.name}' can be scored on no task", where=subject.path,
            got="; ".join(f"{task}: {reason}" for task, reason in reasons.items()),
            hint=f"--heads {self.specs[0].id}=ADAPTER names a head for a task",
        )  # fmt: skip

    def _row(self, subject: Subject, own: Mapping[str, TaskScore | str], outcomes: bool) -> dict[str, Any]:
        cells = {spec.id: self._cell(subject.name, spec.id, outcomes) for spec in self.specs}
        path = None if subject.path is None else str(subject.path)
        sha256 = None if subject.adapter is None else subject.adapter.sha256
        head = {"name": subject.name, "kind": subject.kind, "path": path, "sha256": sha256}
        return head | {"cells": cells} | averages(self.cells[subject.name], own)

    def _cell(self, name: str, task: str, outcomes: bool) -> dict[str, Any]:
        return cell_record(self.cells[name][task], self.sources.get((name, task)), outcomes=outcomes)

    def _task(self, spec: TaskSpec) -> dict[str, Any]:
        data = next((data for key, data in self.data.items() if key[0] == spec.id), None)
        main = metrics_for(self.kinds[spec.id], self.scoring["metrics"] or spec.metrics)[0]
        found: dict[str, Any] = {"id": spec.id, "kind": self.kinds[spec.id], "metric": main.name, "title": main.title}
        found["lower_is_better"] = main.lower_is_better
        if data is not None:
            found |= {"n": len(data), "available": data.available, "source": data.source, "sha256": data.sha256}
        return found


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A model, its configuration, the modules whose weights were made up, and the classes that it was loaded for."""

    model: nn.Module
    config: Any
    fresh: tuple[str, ...]
    labels: tuple[str, ...]
