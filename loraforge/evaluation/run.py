"""The cells of an evaluation: the base is loaded, adapters and heads are put in, every task is scored."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from loraforge.calibrate.encode import load_tokenizer
from loraforge.errors import LoraforgeError, raise_problems
from loraforge.evaluation.batches import Progress
from loraforge.evaluation.heads import Head, Heads, NoHead
from loraforge.evaluation.metrics import LABELLED, metrics_for
from loraforge.evaluation.score import TaskScore, score_task
from loraforge.evaluation.subjects import Subject, adapted
from loraforge.evaluation.swapping import swapped
from loraforge.linalg.device import named_when_full
from loraforge.tasks import TaskData, TaskSpec, load_model, load_task, resolve_kind, task_labels, task_type_of


@dataclass(slots=True)
class Run:
    """One evaluation while it runs.

    Attributes:
        base: Folder, id, or a model in memory.
        specs: The columns, filled from cards.
        subjects: The rows, the base first.
        heads: Who answers what with which head.
        split: Split that is scored.
        limit: Largest number of rows a task.
        tokenizer: The base's.
        scoring: Arguments of `score_task`.
        loading: Arguments of `load_model`.
        progress: Callback or None.
        kinds: Task -> kind.
        data: The rows of a task, by the head that they are numbered for.
        cells: Row -> task -> score, or why there is none.
        sources: (row, task) -> where its head came from.
    """

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
        self.cells = {subject.name: {} for subject in self.subjects}
        misplaced = map(self._misplaced, self.subjects)
        raise_problems([found for found in misplaced if found is not None])
        if self.tokenizer is None and set(self.kinds.values()) != {"images"}:
            folder = getattr(getattr(self.base, "config", None), "name_or_path", None) or self.base
            self.tokenizer = load_tokenizer(folder, "evaluation")

    def score(self) -> None:
        """Fills the cells, one class of base in memory at a time."""
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
        loaded = self._load(self.base, specs[0])
        for subject in self.subjects:
            if subject.kind == "model":
                continue
            if subject.adapter is not None and subject.adapter.task_type == "SEQ_CLS" and not loaded.labels:
                self.cells[subject.name] |= {spec.id: "the adapter is a classifier's" for spec in specs}
                continue
            with adapted(loaded.model, subject) as model:
                for spec in specs:
                    self._score_cell(subject, spec, model, loaded)

    def _load(self, place: Any, spec: TaskSpec, card: Mapping[str, Any] | None = None) -> _Loaded:
        if any(self.cells.values()):
            # The model before may hang on reference cycles; two at a time may be too many.
            gc.collect()
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
        hint = "--batch-tokens N bounds what a forward pass needs"
        with named_when_full(self.loading["device"], "scoring a task", spec.id, hint):
            return score_task(model, self.data[key], tokenizer=self.tokenizer, progress=self.progress, **self.scoring)

    def _tell(self, subject: Subject, spec: TaskSpec) -> None:
        if self.progress is not None:
            done = sum(len(cells) for cells in self.cells.values())
            self.progress("cells", f"{subject.name} on {spec.id}", done, len(self.subjects) * len(self.specs))

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
        return self.unscored(subject, reasons)

    def unscored(self, subject: Subject, reasons: Mapping[str, object]) -> LoraforgeError:
        """The error of a row that no task can be scored for, with the reason by task."""
        return LoraforgeError(
            f"'{subject.name}' can be scored on no task", where=subject.path,
            got="; ".join(f"{task}: {reason}" for task, reason in reasons.items()),
            hint=f"--heads {self.specs[0].id}=ADAPTER names a head for a task",
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A model, its configuration, the modules whose weights were made up, and the classes that it was loaded for."""

    model: nn.Module
    config: Any
    fresh: tuple[str, ...]
    labels: tuple[str, ...]
