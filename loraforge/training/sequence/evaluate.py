"""Scores a run's adapters, after each task and once more by `cl_eval`, and writes down what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError
from loraforge.kernels.backend import kernel_report
from loraforge.linalg.device import choose_device, peak_rss
from loraforge.tasks import load_model
from loraforge.training.ilora.adapters import load_adapter
from loraforge.training.ranks import from_first, is_first, wait
from loraforge.training.sequence.depends import base_identity, check_same, depends_on
from loraforge.training.sequence.layout import STATE, read_json, task_folder, write_json
from loraforge.training.sequence.material import read_material
from loraforge.training.sequence.matrix import (
    BASE_SCORES,
    SCORES,
    Row,
    metrics_of,
    read_matrix,
    single_scores,
    write_matrix,
)
from loraforge.training.sequence.report import write_reports
from loraforge.training.sequence.scoring import score_adapters
from loraforge.training.sequence.spec import SequenceSpec, parse_sequence
from loraforge.training.sequence.state import DONE, TRAINED, RunState, open_run, read_state
from loraforge.training.sequence.work import Notify, Progress, Work, build_model


def score_base(work: Work) -> None:
    """Scores the untrained base on every task that it is not scored on yet."""
    path = work.run / BASE_SCORES
    known: dict[str, Any] = from_first(read_json(path) if is_first() else {})
    missing = [data for data in work.material.scored if data.spec.id not in known]
    if not missing:
        return
    spec, material = work.spec, work.material
    model, _, _ = load_model(
        spec.base_model, material.kind, head_labels=material.head_labels, dtype=spec.dtype, seed=spec.seed,
        device=choose_device(work.device),
    )  # fmt: skip
    found = score_adapters(
        model, ["base"], missing, tokenizer=material.tokenizer, settings=spec.eval, seed=spec.seed,
        stage="score base", progress=work.progress,
    )["base"]  # fmt: skip
    if is_first():
        write_json(path, known | found)
    wait()


def is_scored(work: Work, unit: str) -> bool:
    """Whether a unit's adapters are scored on every task."""
    matrix = read_matrix(work.run, work.spec.task_ids, (unit,), work.spec.adapters)
    scores = read_json(task_folder(work.run, unit) / SCORES)
    return all(
        matrix[adapter] and all(task in scores[adapter] for task in work.spec.task_ids)
        for adapter in work.spec.adapters
    )


def score_unit(work: Work, unit: str, model: Any = None) -> None:
    """Scores a unit's adapters on every task, seen and unseen, and writes the scores beside them.

    Args:
        work: The run.
        unit: Id of the unit.
        model: With its adapters; None: they are read from the unit's folder.
    """
    spec, folder = work.spec, task_folder(work.run, unit)
    adapters = list(spec.adapters)
    if model is None:
        model = build_model(work).to(choose_device(work.device))
        for adapter in adapters:
            load_adapter(model, folder / adapter, adapter)
    found = score_adapters(
        model, adapters, work.material.scored, tokenizer=work.material.tokenizer, settings=spec.eval, seed=spec.seed,
        stage=f"score {unit}", progress=work.progress,
    )  # fmt: skip
    if is_first():
        write_json(folder / SCORES, read_json(folder / SCORES) | found)
    wait()


def write_results(
    spec: SequenceSpec,
    state: RunState,
    notes: Sequence[str] = (),
    single: Row | None = None,
    notify: Notify | None = None,
    report: bool = True,
) -> dict[str, Any]:
    """Writes cl_matrix, cl_metrics, run.json and the report from what lies in the run's folder.

    Args:
        spec: The sequence.
        state: Of the run.
        notes: Lines that were told while it ran.
        single: Scores of tasks trained alone, for `intransigence`.
        notify: Called with a line if the metrics are undefined.
        report: Whether the report is drawn.

    Returns:
        What `train_ilora` returns.

    Raises:
        OSError: The disk refuses.
    """
    run, notes = state.run, list(notes)
    units = [entry["id"] for entry in state.entries]
    matrix = read_matrix(run, spec.task_ids, units, spec.adapters)
    try:
        metrics = metrics_of(matrix, spec.method, len(spec.tasks), single)
    except LoraforgeError as error:
        # A score may be undefined on the rows at hand; the training is sound all the same.
        metrics = dict.fromkeys(spec.adapters)
        notes.append(f"warning: the sequence has no metrics: {error.what}")
        if notify is not None:
            notify(notes[-1])
    write_matrix(run, matrix, metrics, spec.task_ids, units)
    finished = [entry["id"] for entry in state.entries if entry["state"] == DONE]
    found = {
        "out": str(run),
        "method": spec.method,
        "seed": spec.seed,
        "tasks": list(spec.task_ids),
        "finished": finished,
        "adapters": {unit: _adapters(task_folder(run, unit)) for unit in finished},
        "final_adapter": spec.ilora_config().final_adapter,
        "matrix": matrix,
        "metrics": metrics,
        "units": state.entries,
        "warnings": list(dict.fromkeys(note for note in notes if note.startswith(("warning", "note")))),
    }
    about = {key: state.content[key] for key in ("versions", "processes", "config_hash", "depends")}
    machine = {"peak_rss_bytes": peak_rss(), "kernels": kernel_report()}
    write_json(run / "run.json", {"command": "train-ilora", **found, **about, **machine})
    if report:
        write_reports(run)
    return found


def _adapters(folder: Path) -> dict[str, str]:
    return {name: str(folder / name) for name in ("default", "ema") if (folder / name / STATE).is_file()}


def cl_eval(
    run: str | Path,
    *,
    again: bool = False,
    single: str | Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> dict[str, Any]:
    """Scores the adapters of a run on every task and writes its matrix, metrics and report anew.

    Args:
        run: Folder of a training sequence.
        again: Score what has scores already, too.
        single: Folder of a run of the method `single` over the same tasks, for `intransigence`.
        device: auto, cpu, cuda or cuda:0.
        progress: Called with (stage, detail, done, total).
        notify: Called with lines for people.

    Returns:
        As `train_ilora`.

    Raises:
        LoraforgeError: No run, or its base or rows changed since it was trained.
    """
    state = read_state(Path(run).resolve())
    spec = replace(parse_sequence(state.content["sequence"], where=state.run), output_dir=state.run)
    own = None if single is None else single_scores(Path(single).resolve(), spec.task_ids)
    material = read_material(spec)
    base = base_identity(spec.base_model, material.config)
    depends = depends_on(spec, base, material.kind, material.head_labels, material.train, material.scored)
    check_same(state.depends, depends, state.run)
    work = Work(spec, state.run, material, base, device, progress, notify or (lambda line: None))
    with open_run(state.run, resume=True, overwrite=False):
        if again:
            (state.run / BASE_SCORES).unlink(missing_ok=True)
        score_base(work)
        for entry in state.entries:
            unit = entry["id"]
            if entry["state"] in (TRAINED, DONE) and (again or not is_scored(work, unit)):
                score_unit(work, unit)
                state.update(unit, state=DONE)
        return write_results(spec, state, single=own, notify=notify)
