"""`train_ilora`: the tasks of a sequence one after another, scored after each, resumable at any step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError, UsageError, did_you_mean
from loraforge.linalg.device import choose_device
from loraforge.provenance import versions
from loraforge.training.arguments import training_arguments
from loraforge.training.ranks import from_first, is_first, wait, world
from loraforge.training.record import PACKAGES
from loraforge.training.sequence.checks import METHODS
from loraforge.training.sequence.depends import base_identity, depends_on
from loraforge.training.sequence.evaluate import is_scored, score_base, score_unit, write_results
from loraforge.training.sequence.layout import REPORT, task_folder
from loraforge.training.sequence.material import read_material
from loraforge.training.sequence.matrix import early_report, read_matrix
from loraforge.training.sequence.plan import plan
from loraforge.training.sequence.settings import resolved, select_units, with_settings
from loraforge.training.sequence.spec import SequenceSpec, load_sequence, parse_sequence
from loraforge.training.sequence.state import DONE, TRAINED, TRAINING, RunState, begin, open_run, read_state
from loraforge.training.sequence.unit import train_unit
from loraforge.training.sequence.work import Notify, Progress, Work

RESUME = ("auto", "never")


def train_ilora(
    sequence: str | Path | Mapping[str, Any] | SequenceSpec,
    *,
    method: str | None = None,
    set: Iterable[str] | Mapping[str, Any] | None = None,
    resume: str | Path = "auto",
    overwrite: bool = False,
    tasks: str | Iterable[str] | None = None,
    dry_run: bool = False,
    out: str | Path | None = None,
    seed: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> dict[str, Any]:
    """Trains a sequence of tasks and scores every adapter on every task after each.

    Args:
        sequence: A YAML file, its content, or a SequenceSpec.
        method: One of `ilora`, `seq`, `er`, `joint`, `single`; another one than the file's goes into a folder of its
            own, `<output_dir>-<method>`, unless `out` is given.
        set: `KEY=VALUE` settings over the file's.
        resume: `auto`: finished tasks are skipped, a broken one goes on from its last whole checkpoint; `never`: an
            existing run is refused; a run's folder, or a checkpoint of its broken task, to go on from there.
        overwrite: Replace an existing run instead of going on with it.
        tasks: Which tasks to train: `1-3`, `2`, ids. The others keep their place in the sequence.
        dry_run: Return the plan; train nothing, write nothing.
        out: Folder of the run.
        seed: Of every random draw.
        device: auto, cpu, cuda or cuda:0.
        progress: Called with (stage, detail, done, total).
        notify: Called with lines for people: warnings, and how much was forgotten after each task.

    Returns:
        {out, method, tasks, matrix, metrics, adapters, units, warnings}; for a dry run the plan.

    Raises:
        UsageError: Unknown settings, methods or tasks.
        LoraforgeError: Bad input of any kind; a run begun with other settings, base or data; a full disk.
    """
    spec, checkpoint, resume = _asked(sequence, method, set, resume, out, seed)
    chosen = select_units(spec, tasks)
    notes: list[str] = []

    def tell(line: str) -> None:
        notes.append(line)
        if notify is not None and is_first():
            notify(line)

    device = _start_processes(spec, device)
    material = read_material(spec)
    base = base_identity(spec.base_model, material.config)
    work = Work(spec, spec.output_dir, material, base, device, progress if is_first() else None, tell)
    for notice in work.config.notices() if spec.method == "ilora" else ():
        tell(f"note: {notice}")
    if spec.method == "joint" and any(task.overrides for task in spec.tasks):
        tell("note: jointly, the overrides of single tasks have no effect")
    if dry_run:
        return plan(work, chosen)
    goes_on = resume == "auto" and not overwrite
    held = open_run(work.run, resume=goes_on, overwrite=overwrite) if is_first() else nullcontext()
    with held:
        wait()
        return _run(work, chosen, checkpoint, notes)


def _asked(
    sequence: str | Path | Mapping[str, Any] | SequenceSpec,
    method: str | None,
    settings: Iterable[str] | Mapping[str, Any] | None,
    resume: str | Path,
    out: str | Path | None,
    seed: int | None,
) -> tuple[SequenceSpec, Path | None, str]:
    """The sequence as it is to be run, the checkpoint to go on from, and `auto` or `never`."""
    if isinstance(sequence, SequenceSpec):
        spec = sequence
    elif isinstance(sequence, Mapping):
        spec = parse_sequence(sequence)
    else:
        spec = load_sequence(sequence)
    if settings:
        spec = with_settings(spec, settings)
    if seed is not None:
        spec = with_settings(spec, {"train.seed": seed})
    if method is not None and method != spec.method:
        if method not in METHODS:
            raise UsageError(f"unknown method '{method}'", where="--method", hint=did_you_mean(method, METHODS))
        beside = spec.output_dir.with_name(f"{spec.output_dir.name}-{method}")
        spec = with_settings(replace(spec, output_dir=beside), {"method": method})
    if out is not None:
        spec = replace(spec, output_dir=Path(out).resolve())
    if str(resume) in RESUME:
        return spec, None, str(resume)
    place = Path(resume).resolve()
    if (place / "sequence.json").is_file():
        return replace(spec, output_dir=place), None, "auto"
    if place.name.startswith("checkpoint-") and place.parent.parent == spec.output_dir.resolve() and place.is_dir():
        return spec, place, "auto"
    raise UsageError(
        "there is nothing to go on from", where=f"--resume {resume}",
        expected=f"auto, never, the folder of a run, or a checkpoint of a task in {spec.output_dir}",
    )  # fmt: skip


def _start_processes(spec: SequenceSpec, device: str) -> str:
    """Checks the training arguments of every task, and forms the group of processes where there are several.

    Returns:
        The device of this process.
    """
    chosen = choose_device(device)
    if chosen.index:
        hint = f"CUDA_VISIBLE_DEVICES={chosen.index} and --device cuda"
        raise UsageError("training takes the first GPU that it sees", got=device, hint=hint)
    for index in range(len(spec.tasks)):
        values = {**spec.train, **(spec.tasks[index].overrides or {})}
        values.pop("seed", None)
        place = f"train, task '{spec.tasks[index].id}'"
        made = training_arguments(values, spec.output_dir, device=chosen, seed=spec.seed, where=place)
    return str(made.device)


def _run(work: Work, chosen: Iterable[int], checkpoint: Path | None, notes: list[str]) -> dict[str, Any]:
    """The units one after another; what is finished is skipped."""
    state = _begin(work)
    _check_checkpoint(state, checkpoint)
    score_base(work)
    worked = False
    for index in chosen:
        unit = work.units[index]
        model = None
        if state.entry(unit)["state"] not in (TRAINED, DONE):
            state.update(unit, state=TRAINING)
            own = checkpoint if checkpoint is not None and checkpoint.parent == task_folder(work.run, unit) else None
            model, told = train_unit(work, index, own)
            state.update(unit, state=TRAINED, **told)
        if state.entry(unit)["state"] == TRAINED or not is_scored(work, unit):
            score_unit(work, unit, model)
            state.update(unit, state=DONE)
            worked = True
            _tell_forgetting(work, index)
        del model
        if is_first():
            write_results(work.spec, state, notes, report=False)
        wait()
    found: dict[str, Any] = {}
    if is_first():
        drawn = not worked and (work.run / REPORT).is_file()
        found = write_results(work.spec, state, notes, notify=work.notify, report=not drawn)
    return from_first(found)


def _check_checkpoint(state: RunState, checkpoint: Path | None) -> None:
    """Refuses a checkpoint of a task that is finished: it would be passed over."""
    for entry in state.entries:
        if checkpoint is not None and entry["state"] in (TRAINED, DONE):
            if checkpoint.parent == task_folder(state.run, entry["id"]):
                raise LoraforgeError(
                    "the task of this checkpoint is finished", where=checkpoint, got=f"{entry['id']}: {entry['state']}",
                    expected="a checkpoint of a task that is not",
                )  # fmt: skip


def _tell_forgetting(work: Work, index: int) -> None:
    spec = work.spec
    if spec.method in ("joint", "single") or not is_first():
        return
    matrix = read_matrix(work.run, spec.task_ids, work.units, spec.adapters)
    for line in early_report(matrix, spec.task_ids, index, work.run):
        work.notify(line)


def _begin(work: Work) -> RunState:
    """The state of the run, the same in every process."""
    spec, material = work.spec, work.material
    depends = depends_on(spec, work.base, material.kind, material.head_labels, material.train, material.scored)
    problem: LoraforgeError | None = None
    if is_first():
        about = {"sequence": resolved(spec), "versions": versions(*PACKAGES), "processes": world()}
        try:
            begin(work.run, depends=depends, units=work.units, about=about)
        except LoraforgeError as error:
            problem = error
    # The other processes must not wait for one that has left.
    told = from_first(None if problem is None else str(problem))
    if told is not None:
        raise problem or LoraforgeError(told)
    state = read_state(work.run)
    if state.content["versions"] != versions(*PACKAGES):
        work.notify(
            f"warning: the run was begun with {_told(state.content['versions'])}; now {_told(versions(*PACKAGES))}"
        )
    if state.content["processes"] != world():
        work.notify(f"warning: the run was begun with {state.content['processes']} processes; its batches change")
    return state


def _told(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in found.items())
